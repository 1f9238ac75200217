"""Where escala keeps its things and what it talks to: ESCALA_* variables, with defaults that need none of
them.

In the CLI's path: no ray, torch or mlflow here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from escala.contract.errors import SpecError
from escala.contract.redaction import hide


class Settings(BaseSettings):
    """One home: its database, its cluster, its tracker. Two homes live side by side when their ports differ.

    The default ports keep clear of Ray's, MLflow's and each other's own defaults (6379, 8265, 5000), so that
    another cluster on the machine is neither joined nor hindered.
    """

    model_config = SettingsConfigDict(
        env_prefix="ESCALA_",
        env_ignore_empty=True,  # as if unset: an empty home would be the present directory
        frozen=True,
        extra="ignore",
        populate_by_name=True,
    )

    home: Path = Field(
        Path("~/.escala"),
        description="where escala keeps its things; on storage that drivers and workers share",
    )
    database_url: str = Field(
        "", description="the queue of jobs, postgresql+psycopg://... too; empty: sqlite:///HOME/escala.db"
    )
    ray_address: str | None = Field(
        None, description="HOST:PORT of the head of a Ray cluster that runs already; None: the embedded one"
    )
    ray_dashboard: str = Field(
        "", description="that head's dashboard and job server, a URL; empty: http://HOST:8265"
    )
    tracking_uri: str | None = Field(
        None,
        validation_alias=AliasChoices("ESCALA_TRACKING_URI", "MLFLOW_TRACKING_URI"),
        description="an MLflow that runs already; None: the embedded one",
    )
    ray_port: int = Field(6399, ge=1024, le=65535, description="of the embedded head")
    ray_dashboard_port: int = Field(8299, ge=1024, le=65535, description="of the embedded head's dashboard")
    mlflow_port: int = Field(5099, ge=1024, le=65535, description="of the embedded MLflow server")
    max_running_jobs: int = Field(
        2, ge=1, le=100_000, description="jobs that run at once; the rest wait in the queue"
    )
    num_cpus: int = Field(
        default_factory=lambda: max(os.cpu_count() or 1, 4),
        ge=1,
        le=100_000,
        description="logical CPUs of the embedded head; by default more than the machine has where it has few: a "
        "waiting driver holds one and uses none",
    )
    start_seconds: float = Field(
        300.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="how long a managed process may take until it answers",
    )
    cluster: str = Field(
        "local",
        min_length=1,
        description="whose prices and energy records and plans use: a name in clusters/, or a YAML file",
    )
    experiment: str = Field("escala", min_length=1, max_length=500, description="MLflow's, that runs go to")

    def __init__(self, **values: Any) -> None:
        """From the environment; `values` go first. Raises SpecError that names the variable."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(error) from None  # pydantic's own words show all values

    def __repr__(self) -> str:
        return hide(super().__repr__())

    __str__ = __repr__

    @property
    def gcs_address(self) -> str:
        """HOST:PORT for ray.init, embedded or not."""
        return self.ray_address or f"127.0.0.1:{self.ray_port}"

    @property
    def tracker(self) -> str:
        """The address of the tracker, embedded or not."""
        return self.tracking_uri or f"http://127.0.0.1:{self.mlflow_port}"

    @field_validator("ray_address", "tracking_uri", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().absolute()
        except (RuntimeError, OSError) as error:  # no HOME in the environment, and no such user
            raise ValueError(f"{value} cannot be found: {error}; set it to a directory") from error

    @field_validator("cluster")
    @classmethod
    def _from_anywhere(cls, value: str) -> str:
        """A file's path as an absolute one: the reconcile loop reads it, too, and from another directory."""
        return str(Path(value).absolute()) if Path(value).suffix in (".yaml", ".yml") else value

    @field_validator("ray_address")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            host, _, port = value.rpartition(":")
            if not host or not port.isdigit() or "//" in host:
                shown = repr(value) if "@" not in value else "an address with a user"
                raise ValueError(f"{shown} is not HOST:PORT, for example 10.0.0.7:6379")
        return value

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        ports = [self.ray_port, self.ray_dashboard_port, self.mlflow_port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"ray_port, ray_dashboard_port and mlflow_port must differ, and are {ports}")
        filled = {}
        if not self.database_url:
            filled["database_url"] = f"sqlite:///{self.home / 'escala.db'}"
        if self.ray_address is None:
            filled["ray_dashboard"] = f"http://127.0.0.1:{self.ray_dashboard_port}"
        elif not self.ray_dashboard:
            filled["ray_dashboard"] = f"http://{self.ray_address.rpartition(':')[0]}:8265"
        self.__dict__.update(filled)  # frozen for everybody else; this is still construction
        return self

    def environment(self) -> dict[str, str]:
        """These settings as ESCALA_* variables, so that a child process reads the same ones."""
        values = self.model_dump(mode="json")
        return {f"ESCALA_{name.upper()}": str(value) for name, value in values.items() if value is not None}


class RolloutsSettings(BaseSettings):
    """Where the rollout service listens, and its bearer token. On another address than loopback it needs one."""

    model_config = SettingsConfigDict(env_prefix="ESCALA_ROLLOUTS_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", min_length=1, description="address that the service listens on")
    port: int = Field(8199, ge=1024, le=65535, description="that it listens on; Serve's own default is 8000")
    token: SecretStr | None = Field(
        None, min_length=16, description="bearer token of every request; None: no token"
    )

    def __init__(self, **values: Any) -> None:
        """From the environment; `values` go first. Raises SpecError that names the variable."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(error, "ESCALA_ROLLOUTS_") from None


def _explained(error: ValidationError, prefix: str = "ESCALA_") -> SpecError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    variable = (
        name if name.isupper() else f"{prefix}{name.upper()}" if name else "the ESCALA_*_PORT variables"
    )
    message = first["msg"].removeprefix("Value error, ")
    return SpecError(f"{variable}: {message}", f"correct or unset {variable}")

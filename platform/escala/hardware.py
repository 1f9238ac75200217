"""Where the files of devices and clusters are, and reading them: YAML that the user owns (`escala.schema.hardware`).

`clusters/devices.yaml` holds devices; a cluster's file names one of them, or holds its own. `escala bench device`
writes a measured one. In the CLI's path: no numpy, torch or ray here.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from escala import documents, spec
from escala.contract.errors import NotFoundError, SpecError
from escala.schema.hardware import Cluster

DEVICES = "devices.yaml"


def directory() -> Path:
    """The shipped `clusters/`: the checkout's, or the wheel's shared data."""
    checkout = Path(__file__).parents[2] / "clusters"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data"), "share/escala/clusters")


def names() -> list[str]:
    """The shipped clusters."""
    return sorted(p.stem for p in directory().glob("*.yaml") if p.name != DEVICES)


def load_cluster(name: str | Path) -> Cluster:
    """A shipped cluster by its name, or a YAML file's path; its `device` may be a name in devices.yaml, beside the
    file or shipped. Raises NotFoundError, SpecError.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = directory() / f"{name}.yaml"
        if not path.is_file() or path.name == DEVICES:
            raise NotFoundError(
                f"there is no cluster {str(name)!r}",
                f"one of {', '.join(names())}; or the path of a YAML file",
            )
    data = documents.read_yaml(path)
    if isinstance(data.get("device"), str):
        data["device"] = _device(data["device"], path.parent)
    cluster: Cluster = spec.validate(Cluster, data, path.name)
    return cluster


def _device(name: str, beside: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = documents.read_yaml(directory() / DEVICES)
    if (beside / DEVICES).is_file():
        found |= documents.read_yaml(beside / DEVICES)
    if not isinstance(found.get(name), Mapping):
        raise SpecError(f"there is no device {name!r}", f"one of {', '.join(sorted(found))}")
    device: Mapping[str, Any] = found[name]
    return device

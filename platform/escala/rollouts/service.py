"""What the rollout service used, and how long its replicas take to start: accounts of the replicas' figures. Pure.

A replica's figures are cumulative, so that those of the last second of one that was killed are all that is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from escala.contract.records import Rates


@dataclass(frozen=True)
class Reading:
    """One replica's figures. None: not known.

    Attributes:
        seconds: when they were read.
        latency_seconds, ttft_seconds, generation_seconds: 95th percentiles of the last window: of whole responses,
            until their first token, and from it on; requests that are overdue included.
        joules: at the meter since it started; `counted`: by a counter, else an estimate.
        tokens: read and generated.
        refused: actuators that did not obey.
    """

    seconds: float
    latency_seconds: float | None = None
    ttft_seconds: float | None = None
    generation_seconds: float | None = None
    joules: float | None = None
    counted: bool = False
    tokens: float = 0.0
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Account:
    """What a replica, or all that are gone, has used."""

    joules: float | None = 0.0
    tokens: float = 0.0
    counted: bool = False

    def plus(self, other: Account) -> Account:
        """Both together; an unknown part makes the sum unknown."""
        known = self.joules is not None and other.joules is not None
        joules = self.joules + other.joules if known else None  # type: ignore[operator]
        return Account(joules, self.tokens + other.tokens, self.counted and other.counted)


@dataclass(frozen=True)
class Accounts:
    """Of a service since it was started.

    Attributes:
        replicas: those that answered last, by id.
        gone: how many others there were, and what they used together.
        replica_seconds: of replicas that were ready.
        seconds: when they were brought up to date.
        startup_seconds: that the last replica took from the decision until it was ready; None: none has yet.
        starting_since: since when more replicas are wanted than are ready.
    """

    replicas: Mapping[str, Account] = field(default_factory=dict)
    gone: int = 0
    gone_account: Account = Account(counted=True)
    replica_seconds: float = 0.0
    seconds: float | None = None
    startup_seconds: float | None = None
    starting_since: float | None = None

    def update(self, now: float, ready: int, wanted: int, readings: Mapping[str, Reading]) -> Accounts:
        """The accounts at `now`, with `ready` of `wanted` replicas; those without a reading any more are gone."""
        present = {name: Account(r.joules, r.tokens, r.counted) for name, r in readings.items()}
        left = {name: account for name, account in self.replicas.items() if name not in present}
        gone = self.gone_account
        for account in left.values():
            gone = gone.plus(account)
        passed = 0.0 if self.seconds is None else max(now - self.seconds, 0.0)
        found = replace(
            self,
            replicas=present,
            gone=self.gone + len(left),
            gone_account=gone,
            replica_seconds=self.replica_seconds + ready * passed,
            seconds=now,
        )
        return found._with_startup(now, ready, wanted)

    def _with_startup(self, now: float, ready: int, wanted: int) -> Accounts:
        if ready < wanted:
            since = now if self.starting_since is None else self.starting_since
            return replace(self, starting_since=since)
        if self.starting_since is None:
            return self
        return replace(self, startup_seconds=now - self.starting_since, starting_since=None)

    def used(self, rates: Rates | None) -> dict[str, Any]:
        """The service's energy as plain data, by replica and in all; None where it is not known."""
        total = self.gone_account
        for account in self.replicas.values():
            total = total.plus(account)
        return {
            **_energy(total, rates),
            "replica_seconds": self.replica_seconds,
            "replicas": {name: _energy(account, rates) for name, account in self.replicas.items()},
            "gone": {"count": self.gone, **_energy(self.gone_account, rates)},
        }

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Accounts:
        """Back from plain data."""
        replicas = {name: Account(**account) for name, account in plain["replicas"].items()}
        return cls(**{**plain, "replicas": replicas, "gone_account": Account(**plain["gone_account"])})


def _energy(account: Account, rates: Rates | None) -> dict[str, Any]:
    joules = account.joules
    known = joules is not None and account.tokens > 0
    return {
        "joules": joules,
        "joules_per_token": joules / account.tokens if known else None,  # type: ignore[operator]
        "tokens": account.tokens,
        "gco2e": None if rates is None else rates.gco2e(joules),
        "energy_source": None if not joules else "counter" if account.counted else "estimate",
    }

"""What a replica measures of itself and can set: latencies, joules, power. Counters and limits are files, as Linux has
them.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from escala.contract.records import Rates
from escala.rollouts.service import Accounts, Reading
from escala.schema import ModelConfig
from workloads.serving.energy import RaplShare, ReplicaEnergy
from workloads.serving.latency import Latencies, percentile
from workloads.serving.power import cpu_frequency, find_actuator, socket_power

RATES = Rates("c", None, 100.0, 1.5, 2.0, 1e-9, 1e-8)
MODEL = ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=2, max_context_tokens=64)


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_percentiles_of_the_last_window_with_what_is_overdue() -> None:
    clock = Clock()
    found = Latencies(10.0, clock)
    assert found.response_seconds is None
    timings = [found.begin(None) for _ in range(20)]
    for number, timing in enumerate(timings[:19], 1):
        clock.now = 100.0 + number / 10
        found.token(timing)
        found.end(timing, answered=True)
    assert found.response_seconds == pytest.approx(1.9)  # the last one is as old, and not older
    assert found.first_token_seconds == pytest.approx(1.9)
    assert found.generation_seconds == 0.0
    clock.now = 106.0
    assert found.response_seconds == pytest.approx(1.9)
    clock.now = 115.0
    assert found.response_seconds == pytest.approx(15.0)  # those that ended are of another window
    found.end(timings[19], answered=False)
    assert found.response_seconds is None


def test_a_request_waits_since_the_service_was_asked() -> None:
    clock = Clock()
    found = Latencies(10.0, clock)
    early, wrong = found.begin(time.time() - 3.0), found.begin(time.time() + 1000.0)
    clock.now += 1.0
    found.end(wrong, answered=True)
    assert found.response_seconds == pytest.approx(4.0, abs=0.2)
    found.end(early, answered=True)
    assert found.response_seconds == pytest.approx(4.0, abs=0.2)


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([]) is None
    assert percentile([3.0]) == 3.0
    assert percentile([float(n) for n in range(1, 101)]) == 95.0


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


def sockets(root: Path, *microjoules: int) -> None:
    for number, value in enumerate(microjoules):
        write(root / f"intel-rapl:{number}/energy_uj", value)
        write(root / f"intel-rapl:{number}/max_energy_range_uj", 1_000_000)
        write(root / f"intel-rapl:{number}:0/energy_uj", 99)  # a part of the socket: not counted again


def test_a_replicas_part_of_the_sockets_across_the_counters_end(tmp_path: Path) -> None:
    sockets(tmp_path, 100_000, 900_000)
    busy = [(1.0, 10.0), (2.0, 14.0), (2.0, 14.0), (2.0, 20.0)]
    counter = RaplShare(tmp_path, lambda: busy.pop(0))
    sockets(tmp_path, 500_000, 100_000)  # 0.4 J, and 0.2 J across the end
    assert counter.read() == pytest.approx(0.6 / 4)
    sockets(tmp_path, 600_000, 200_000)
    assert counter.read() == pytest.approx(0.6 / 4)  # nobody was busy
    sockets(tmp_path, 700_000, 300_000)
    assert counter.read() == pytest.approx(0.6 / 4)  # not this process


def test_a_counter_that_may_not_be_read_is_unknown_and_the_estimate_says_so(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0/energy_uj").mkdir(parents=True)
    stats: Any = SimpleNamespace(prompt_tokens=100, generated_tokens=100, steps=10, weight_bytes=1000)
    for root, said in ((tmp_path, "no counter: "), (tmp_path / "none", "no RAPL counter")):
        energy = ReplicaEnergy(RATES, MODEL, lambda root=root: RaplShare(root))  # type: ignore[misc]
        assert not energy.counted
        assert said in energy.source
        joules = energy.read(stats, 10.0)
        assert joules is not None
        assert joules > 1.5 * (2.0 * 10 + 1e-8 * 10 * 1000)
        assert ReplicaEnergy(None, MODEL, lambda root=root: RaplShare(root)).read(stats, 10.0) is None  # type: ignore[misc]


def test_the_estimate_is_the_sites(tmp_path: Path) -> None:
    stats: Any = SimpleNamespace(prompt_tokens=0, generated_tokens=0, steps=0, weight_bytes=0)
    energy = ReplicaEnergy(RATES, MODEL, lambda: RaplShare(tmp_path))
    assert energy.read(stats, 10.0) == pytest.approx(1.5 * 2.0 * 10)


def frequencies(root: Path, cpus: range = range(512)) -> None:
    for number in cpus:
        write(root / f"devices/system/cpu/cpu{number}/cpufreq/scaling_max_freq", 3_000_000)
        write(root / f"devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq", 4_000_000)


def test_a_cpus_frequency_is_set_and_put_back(tmp_path: Path) -> None:
    frequencies(tmp_path)
    actuator, said = find_actuator(on_gpu=False, root=tmp_path)
    assert actuator is not None
    assert said == "cpufreq"
    actuator.set(0.5)
    files = list(tmp_path.glob("devices/system/cpu/cpu*/cpufreq/scaling_max_freq"))
    assert sum(file.read_text() == "2000000" for file in files) >= 1
    actuator.restore()
    assert {file.read_text() for file in files} == {"3000000"}


def test_else_the_sockets_power_and_else_nothing_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "class/powercap/intel-rapl:0/constraint_0_power_limit_uw", 90_000_000)
    write(tmp_path / "class/powercap/intel-rapl:0/constraint_0_max_power_uw", 100_000_000)
    actuator, said = find_actuator(on_gpu=False, root=tmp_path)
    assert actuator is not None
    assert said == "RAPL power limit"
    actuator.set(0.6)
    limit = tmp_path / "class/powercap/intel-rapl:0/constraint_0_power_limit_uw"
    assert limit.read_text() == "60000000"
    limit.unlink()
    limit.mkdir()  # what refuses
    with pytest.raises(OSError, match="directory"):
        actuator.set(0.5)
    actuator, said = find_actuator(on_gpu=False, root=tmp_path)
    assert actuator is None
    assert said.startswith("not available: no cpufreq here; ")
    with pytest.raises(OSError, match="no RAPL power limit"):
        socket_power(tmp_path / "none")
    with pytest.raises(OSError, match="no cpufreq"):
        cpu_frequency(tmp_path / "none")


def test_accounts_measure_a_start_up_and_survive_as_plain_data() -> None:
    accounts = Accounts()
    reading = {"a": Reading(0.0, joules=1.0, tokens=4.0)}
    for now, ready, wanted in ((0.0, 1, 1), (5.0, 1, 2), (10.0, 1, 2), (17.0, 2, 2)):
        accounts = Accounts.of(accounts.update(now, ready, wanted, reading).to_plain())
    assert accounts.startup_seconds == 12.0
    assert accounts.starting_since is None
    assert accounts.replica_seconds == pytest.approx(5 + 5 + 14)
    assert accounts.update(20.0, 2, 2, {}).gone == 1

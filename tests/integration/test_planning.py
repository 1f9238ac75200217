"""The loop that proposes, runs and refits, and the measurement of a device, on the session's cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from escala import Escala, load_law, spec
from escala.documents import dump, read_yaml
from escala.hardware import load_cluster
from escala.jobs.attention import read_pilot
from escala.planning.limits import Limits
from escala.settings import Settings
from escala.views.plans import ExplorationView
from tests.faults.victims import ended
from tests.integration.sweeps import BASE, write

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TARGET, MAX_FLOPS = 1e13, 2e11


@pytest.fixture(scope="module")
def law(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A law of nine tiny runs; it need not be healthy to be explored."""
    model = {"vocab_size": 512, "max_context_tokens": 32}
    base = {**BASE, "model": model, "training": {"evaluation_tokens": 4096, "log_every_steps": 50}}
    vary = {"n_total": [20_000, 40_000, 80_000], "tokens": [65_536, 131_072, 262_144]}
    space = write(tmp_path_factory.mktemp("space"), "ninetiny", vary=vary, base=base)
    job = ended(Escala().sweep(space).id).job
    assert job.state == "succeeded", job.message
    points = Escala().sweep_points(job.id).points
    assert all(point["energy_joules"] > 0 for point in points)  # by the coefficients of clusters/local.yaml
    return Escala().fit_sweeps([job.id], "ninetiny", bootstrap=200).law


@pytest.mark.nightly(minutes=2)
def test_exploring_keeps_to_its_budget_and_goes_on_where_it_was_left(law: str) -> None:
    budget = 3e10  # the smallest run takes 8e9

    def explore() -> list[ExplorationView]:
        return list(
            Escala().explore(law, Limits(compute_flops=TARGET), MAX_FLOPS, budget, width=1e-6, batch=2)
        )

    states = explore()
    last = states[-1]
    assert 0 < last.spent_flops <= budget
    assert last.rounds[0].law == law
    assert last.rounds[0].obtained
    for each in last.rounds:
        assert each.fitted is not None
        assert each.width_obtained is not None
        assert each.width_obtained > 0
    points = load_law(str(last.rounds[-1].fitted)).points
    assert len(points) == 9 + sum(r.points or 0 for r in last.rounds)
    assert explore() == []  # nothing fits any more

    # Cut off while the last round's sweep ran: it is waited for, not started again.
    path = Settings().home / "explore" / "ninetiny.json"
    journal = json.loads(path.read_text())
    kept = ("law", "proposals", "job_id")
    journal["rounds"][-1] = {key: journal["rounds"][-1][key] for key in kept}
    path.write_text(json.dumps(journal))
    jobs = len(Escala().jobs(everything=True))
    again = explore()[-1].rounds[-1]
    assert again.job_id == last.rounds[-1].job_id
    assert again.obtained == last.rounds[-1].obtained
    assert len(Escala().jobs(everything=True)) == jobs


def test_a_device_is_measured_by_a_job_and_keeps_its_prices(cluster: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump({"usd_per_device_hour": {"value": 2.0, "source": "a test"}}))
    quick = {"widths": [64, 128], "tokens": 128, "context_tokens": 64, "vocab_size": 512, "seconds": 0.05}
    job = ended(Escala().bench_device(2, overrides=quick).id).job
    assert job.state == "succeeded", job.message
    written = Escala().write_cluster(job.id, path)
    assert load_cluster(path) == written
    assert written.devices == 2
    assert written.usd_per_device_hour is not None
    device = written.device
    assert device.training is not None
    assert set(device.training["bf16"].block) == {64, 128}
    assert "escala bench device" in device.measured
    assert 1e8 < device.memory_bytes_per_second.value < 1e12
    assert device.link_bytes_per_second is not None
    assert 0 < device.training["fp32"].efficiency_at(3) <= 1


def test_attention_is_measured_by_a_job_and_decides_with_a_pilot(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "clusters/local.yaml").read_text())
    quick = {
        "kinds": ["exact", "window", "hybrid"],
        "contexts": [64, 128],
        "window_tokens": 16,
        "seconds": 0.01,
    }
    job = ended(Escala().bench_attention({**quick, "features": 16}).id).job
    assert job.state == "succeeded", job.message
    table = Escala().write_attention(job.id, path).device.attention["fp32"]
    assert load_cluster(path).device.attention["fp32"] == table
    assert set(table.kinds) == {*quick["kinds"]}
    for speed in table.kinds.values():
        assert speed.forward.keys() == speed.train.keys() == speed.decode.keys() == {64, 128}
        assert speed.left_out == []

    training = {**BASE["training"], "steps": 2, "evaluation_tokens": 1024}
    base = spec.merge(BASE, {"model": {"max_context_tokens": 128}, "training": training})
    pilot = Escala().submit("pretrain", overrides=["measure_attention_window=16"], base=base)
    assert ended(pilot.id).job.state == "succeeded"
    found = read_pilot(Settings(), pilot.id)
    assert (found.window_tokens, found.context_tokens) == (16, 128)
    assert 0.1 < found.mass < 0.6  # nearly uniform yet: 16 / n over 17 to 128 keys is 0.29 on average

    data = read_yaml(path)
    for kind in ("window", "hybrid"):  # as if both were faster from 64 tokens on, whatever this machine does
        data["device"]["attention"]["fp32"]["kinds"][kind]["train_overtakes"] = 64
    path.write_text(dump(data))
    monkeypatch.setenv("ESCALA_CLUSTER", str(path))
    asked = ["model.attention=auto", f"attention_pilot={pilot.id}"]
    run = ended(Escala().submit("pretrain", overrides=asked, base=base).id).job
    assert (run.config["model"]["attention"], run.config["model"]["window_tokens"]) == ("hybrid", 16)
    assert f"pilot {pilot.id}" in run.tags["escala.chosen.model.attention"]

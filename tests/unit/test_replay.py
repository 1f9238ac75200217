"""Traces, recorded and seeded, and the service that is simulated on them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import NotFoundError, SpecError
from escala.rollouts.policy import Rules
from escala.rollouts.simulator import replay
from escala.rollouts.stability import Plant, propose_gains
from escala.rollouts.traces import Arrival, read_trace, seeded
from escala.schema.governor import GovernorConfig, ReplicaSpeed
from escala.schema.traces import TraceConfig

SPEED = ReplicaSpeed.model_validate(
    {
        "batches": [{"requests": 1, "tokens_per_second": 10.0}, {"requests": 8, "tokens_per_second": 40.0}],
        "prompt_tokens_per_second": 400.0,
        "startup_seconds": 15.0,
    }
)
PLANT = Plant(0.8, 1.0, 3.0)
KP, KI = propose_gains(PLANT)
CONFIG = {
    "target_seconds": 10.0,
    "kp": KP,
    "ki": KI,
    "plant": {"gain": 0.8, "time_constant": 1.0, "delay": 3.0},
    "replica": SPEED.model_dump(),
}
BURSTS = {
    "seed": 1,
    "seconds": 240.0,
    "requests_per_second": 0.2,
    "bursts": [{"at_seconds": 20.0, "seconds": 40.0, "requests_per_second": 1.4}],
    "prompt_tokens": [10, 40],
    "response_tokens": [20, 60],
}


def trace(**changes: Any) -> list[Arrival]:
    return seeded(TraceConfig.model_validate({**BURSTS, **changes}))


def test_a_seed_makes_one_trace_with_the_rates_that_were_asked_for() -> None:
    found = trace(
        seconds=4000.0, bursts=[{"at_seconds": 1000.0, "seconds": 1000.0, "requests_per_second": 2.0}]
    )
    assert found == trace(
        seconds=4000.0, bursts=[{"at_seconds": 1000.0, "seconds": 1000.0, "requests_per_second": 2.0}]
    )
    assert all(a.seconds <= b.seconds for a, b in pairwise(found))
    inside = sum(1000 <= a.seconds < 2000 for a in found)
    assert inside == pytest.approx(2000, rel=0.1)
    assert len(found) - inside == pytest.approx(600, rel=0.15)
    assert {min(a.response_tokens for a in found), max(a.response_tokens for a in found)} == {20, 60}
    assert trace(seed=2) != trace()


def test_recorded_traces_of_ours_and_of_azure(tmp_path: Path) -> None:
    ours = tmp_path / "ours.csv"
    ours.write_text("seconds,prompt_tokens,response_tokens,user\n5.5,10,20,a\n5,0,3,b\n")
    assert read_trace(ours) == [Arrival(0.0, 1, 3), Arrival(0.5, 10, 20)]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:01:50.9990000,374,44\n2023-11-16 18:01:53.4990000,9,2\n"
    )
    assert read_trace(azure) == [Arrival(0.0, 374, 44), Arrival(2.5, 9, 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seconds,prompt_tokens\n1,2\n", "has the columns seconds, prompt_tokens"),
        ("seconds,seconds,prompt_tokens,response_tokens\n1,1,2,3\n", "each once"),
        ("seconds,prompt_tokens,response_tokens\n1,2\n", "line 2: 2 fields under 3 names"),
        ("seconds,prompt_tokens,response_tokens\n1,2,3\nnan,2,3\n", "line 3"),
        ("seconds,prompt_tokens,response_tokens\n1,2.5,3\n", "line 2"),
        ("seconds,prompt_tokens,response_tokens\n1,2,-3\n", "line 2"),
        ("seconds,prompt_tokens,response_tokens\n", "no requests"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(SpecError) as refused:
        read_trace(file)
    assert said in f"{refused.value.message} {refused.value.hint}"


def test_what_is_no_file_and_bursts_that_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_trace(tmp_path / "none.csv")
    file = tmp_path / "trace.yaml"
    file.write_text(yaml.safe_dump({**BURSTS, "bursts": [*BURSTS["bursts"]] * 2}))  # type: ignore[misc]
    with pytest.raises(SpecError, match="begins before the one before it ends"):
        read_trace(file)
    file.write_text(yaml.safe_dump({**BURSTS, "response_tokens": [5, 2]}))
    with pytest.raises(SpecError, match="least <= most"):
        read_trace(file)


def test_a_single_request_takes_its_reading_and_its_tokens() -> None:
    found = replay([Arrival(0.0, 40, 30)], SPEED, Rules(1, 1, 8))
    (only,) = found.responses
    assert only.done - only.asked == pytest.approx(40 / 400 + 30 / 10, abs=0.2)
    assert found.counts == ((0.0, 1),)
    assert found.replica_seconds == pytest.approx(only.done, abs=0.2)


def test_a_full_batch_shares_a_replica_and_the_rest_waits() -> None:
    found = replay([Arrival(0.0, 1, 40) for _ in range(16)], SPEED, Rules(1, 1, 8))
    done = sorted(r.done for r in found.responses)
    assert done[7] == pytest.approx(8 * 40 / 40, rel=0.1)
    assert done[-1] == pytest.approx(2 * 8 * 40 / 40, rel=0.1)


def test_every_request_is_answered_once_and_bounds_hold() -> None:
    for config in (None, GovernorConfig.model_validate(CONFIG)):
        found = replay(trace(), SPEED, Rules(1, 3, 8), config)
        assert len(found.responses) == len(trace())
        assert all(1 <= count <= 3 for _, count in found.counts)
        assert all(r.asked < r.first_token <= r.done for r in found.responses)


def test_the_governor_uses_fewer_replica_seconds_at_the_same_latency() -> None:
    governed = replay(trace(), SPEED, Rules(1, 2, 8, down_seconds=60), GovernorConfig.model_validate(CONFIG))
    alone = replay(trace(), SPEED, Rules(1, 2, 8, down_seconds=60))
    assert max(count for _, count in governed.counts) == max(count for _, count in alone.counts) == 2
    assert governed.percentile(0.95) <= 1.05 * alone.percentile(0.95)
    assert governed.replica_seconds <= 0.9 * alone.replica_seconds
    assert len(governed.counts) == 3  # up once, down once


def test_a_service_that_cannot_get_done_is_an_error() -> None:
    flood = trace(requests_per_second=5.0, bursts=[], response_tokens=[1000, 1000])
    with pytest.raises(SpecError, match="are not done"):
        replay(flood, SPEED, Rules(1, 1, 8))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    (tmp_path / "trace.yaml").write_text(yaml.safe_dump(BURSTS))
    (tmp_path / "governor.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [
        "rollouts",
        "replay",
        str(tmp_path / "trace.yaml"),
        "--governor",
        str(tmp_path / "governor.yaml"),
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "governor" in shown.output
    assert "policy alone" in shown.output
    rows = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert [row["controller"] for row in rows] == ["governor", "policy alone"]
    (tmp_path / "governor.yaml").write_text(yaml.safe_dump({**CONFIG, "kp": 2.0, "ki": 0.5}))
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0

"""Sealed forecasts: the chain, what breaks it, which run scores what, and the head in a real MLflow store."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from escala.contract.errors import ClusterError, LawError
from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, write_json
from escala.laws import fit_law, forecasts
from escala.laws.forecasts import (
    Chain,
    Head,
    by_factor,
    coverage,
    digest_of,
    forecast,
    problems,
    score_run,
    seal,
)
from escala.laws.reference import Stored

POINT = {"n_active": 1e9, "tokens": 4e10}


@pytest.fixture(scope="module")
def stored() -> Stored:
    rng = np.random.default_rng(3)
    size_N, tokens_N = (
        np.exp(rng.uniform(np.log(lo), np.log(hi), 40)) for lo, hi in ((1e7, 1e9), (1e9, 2e10))
    )
    loss_N = (1.7 + 400 * size_N**-0.34 + 410 * tokens_N**-0.28) * np.exp(0.004 * rng.standard_normal(40))
    points = pd.DataFrame({"n_active": size_N, "tokens": tokens_N, "loss_nats": loss_N})
    return Stored(
        "mine",
        1,
        fit_law(points, bootstrap=60),
        {"tokenizer_fingerprint": "t", "evaluation_fingerprint": "e"},
    )


def sealed(stored: Stored, number: int = 0, config: dict | None = None) -> forecasts.Sealed:
    return forecast(stored, {**POINT, "tokens": 4e10 * (1 + number)}, f"run {number}", config)


def test_a_chain_is_whole_and_its_forecasts_come_back(stored: Stored, tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    made = [sealed(stored, i) for i in range(3)]
    chain.append("forecast", made[:2])
    chain.append("forecast", made[2:])
    entries = chain.read()
    assert problems(entries, Head(3, entries[-1].hash)) == []
    assert [each.sealed for each in chain.forecasts()] == made
    assert chain.find(chain.forecasts()[1].id).sealed == made[1]
    assert made[0].extrapolation["tokens"] == pytest.approx(4e10 / stored.law.ranges["tokens"][1])


@pytest.mark.parametrize("damage", ["changed", "removed", "last removed", "reordered", "rewritten"])
def test_what_was_done_to_a_chain_is_said(stored: Stored, tmp_path: Path, damage: str) -> None:
    chain = Chain(tmp_path)
    chain.append("forecast", [sealed(stored, i) for i in range(4)])
    path, entries = tmp_path / "forecasts" / "chain.jsonl", chain.read()
    head = Head(4, entries[-1].hash)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if damage == "changed":
        rows[1]["body"]["high_nats"] = 9.0
    elif damage == "removed":
        del rows[1]
    elif damage == "last removed":
        del rows[-1]
    elif damage == "reordered":
        rows[1], rows[2] = rows[2], rows[1]
    else:  # a whole new chain, every hash right
        other = Chain(tmp_path / "other")
        other.append("forecast", [replace(sealed(stored, i), high_nats=9.0) for i in range(4)])
        rows = [
            json.loads(line) for line in (tmp_path / "other/forecasts/chain.jsonl").read_text().splitlines()
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = problems(chain.read(), head)
    words = {
        "changed": "entry 2 was changed",
        "removed": "entry 2 has the number 3",
        "reordered": "entry 2 has the",
    }
    words |= {"last removed": "its end was removed", "rewritten": "the chain was rewritten"}
    assert len(said) == 1, said
    assert words[damage] in said[0]


def test_a_line_cut_short_by_a_kill_takes_nothing_with_it(stored: Stored, tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.append("forecast", [sealed(stored, 0)])
    path = tmp_path / "forecasts" / "chain.jsonl"
    path.write_bytes(path.read_bytes() + b'{"number": 2, "kind": "fore')
    chain.append("forecast", [sealed(stored, 1)])
    entries = chain.read()
    assert [entry.number for entry in entries] == [1, 2]
    assert problems(entries, Head(2, entries[-1].hash)) == []


def _append(home: Path, made: forecasts.Sealed) -> None:
    for _ in range(5):
        chain = Chain(home)
        with chain.held():
            chain.append("forecast", [made])


def test_processes_that_seal_at_once_make_one_chain(stored: Stored, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(tmp_path, sealed(stored, i))) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    entries = Chain(tmp_path).read()
    assert len(entries) == 20
    assert problems(entries, Head(20, entries[-1].hash)) == []


def attempt(home: Path, config: dict, number: int = 1, **record: object) -> Path:
    files = AttemptFiles(home / f"attempt-{number}")
    files.spool.mkdir(parents=True, exist_ok=True)
    (files.spool / "run_id").write_text("r1")
    spec = AttemptSpec(job_id="j", attempt=number, name="n", workload="pretrain", entry_point="e", config=config,
                       directory=str(files.directory), checkpoints="c", data="d", tracking_uri="spool:x",
                       experiment="x")  # fmt: skip
    write_json(files.spec, spec)
    told = {"status": "succeeded", "started_at": 9e9, "held_out_loss_nats": 2.5, "n_active": 1_000_000_000,
            "train_tokens": 40_000_000_000, "tokenizer_fingerprint": "t", "evaluation_fingerprint": "e"}  # fmt: skip
    write_json(files.outcome, Outcome(kind="succeeded", message="", record={**told, **record}))
    return files.directory


def verified(home: Path, tracker: str) -> list[str]:
    chain = Chain(home)
    return problems(chain.read(), *forecasts.read_heads(tracker, "laws", chain))


@pytest.fixture(scope="module")
def mlflow_at(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_the_run_of_the_configuration_scores_it_once(stored: Stored, tmp_path: Path, mlflow_at: str) -> None:
    config = {"model": {"d_model": 8}, "seed": 1}
    found = seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config), sealed(stored, 0, {"seed": 2})])
    chain = Chain(tmp_path)
    assert verified(tmp_path, mlflow_at) == []
    again = seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config)])
    assert [each.id for each in again] == [found[0].id], "an open forecast is not sealed twice"
    directory = attempt(tmp_path, config)
    assert len(score_run(tmp_path, mlflow_at, "laws", directory)) == 1
    assert score_run(tmp_path, mlflow_at, "laws", directory) == []
    first, second = chain.forecasts()
    assert first.obtained_nats == 2.5
    assert first.error == pytest.approx(2.5 / first.sealed.loss_nats - 1)
    assert second.obtained_nats is None
    entries = chain.read()
    assert verified(tmp_path, mlflow_at) == []
    head, _ = forecasts.read_heads(mlflow_at, "laws", chain)
    assert forecasts.not_kept(entries, head) == 0


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"started_at": 1.0}, None),  # it ran before
        ({"status": "failed", "reason": "no memory"}, "the run failed: no memory"),
        ({"tokenizer_fingerprint": "other"}, "another text"),
        ({"held_out_loss_nats": None}, "no held-out loss"),
    ],
)
def test_a_run_that_cannot_be_compared_is_no_score(
    stored: Stored, tmp_path: Path, mlflow_at: str, record: dict, reason: str | None
) -> None:
    config = {"seed": 1}
    seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config)])
    score_run(tmp_path, mlflow_at, "laws", attempt(tmp_path, config, **record))
    (found,) = Chain(tmp_path).forecasts()
    assert found.obtained_nats is None
    assert (found.score is None) == (reason is None)
    if reason is not None:
        assert found.score is not None
        assert reason in str(found.score.reason)
        score_run(
            tmp_path, mlflow_at, "laws", attempt(tmp_path, config)
        )  # the same run again changes nothing
        assert Chain(tmp_path).forecasts() == [found]


def test_a_bare_point_is_scored_by_a_run_there(stored: Stored, tmp_path: Path, mlflow_at: str) -> None:
    seal(tmp_path, mlflow_at, "laws", [forecast(stored, POINT, "a point")])
    assert score_run(tmp_path, mlflow_at, "laws", attempt(tmp_path, {}, train_tokens=41_000_000_000)) == []
    assert len(score_run(tmp_path, mlflow_at, "laws", attempt(tmp_path, {"seed": 5}))) == 1


def test_without_mlflow_nothing_is_sealed(stored: Stored, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="nothing was queued"):
        seal(tmp_path, "http://127.0.0.1:9", "laws", [sealed(stored)])


def test_a_law_without_intervals_cannot_be_sealed(stored: Stored) -> None:
    bare = Stored("bare", 1, fit_law(stored.law.points, bootstrap=0), {})
    with pytest.raises(LawError, match="no interval"):
        forecast(bare, POINT, "x")


def test_coverage_has_an_interval_of_its_own_and_a_factor(stored: Stored) -> None:
    def one(factor: float, off: float) -> forecasts.Forecast:
        said = replace(
            sealed(stored), extrapolation={"tokens": factor}, low_nats=1.9, high_nats=2.1, loss_nats=2.0
        )
        return forecasts.Forecast("x", 1, said, forecasts.Score("x", "r", 2.0 + off, None, 0.0, 0.0))

    found = [one(1.0, 0.0), one(1.0, 0.05), one(3.0, 0.2), one(8.0, 0.0)]
    total = coverage("all", found)
    assert (total.scored, total.inside) == (4, 3)
    assert total.coverage_low == pytest.approx(0.3006, abs=1e-3)
    assert total.coverage_high == pytest.approx(0.9544, abs=1e-3)
    assert [(c.label, c.inside, c.scored) for c in by_factor(found)] == [
        ("inside the data", 2, 2), ("2 to 4 times", 0, 1), ("beyond 4 times", 1, 1)]  # fmt: skip


def test_the_digest_is_of_the_configuration(stored: Stored) -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_what_was_taken_back_is_found_and_nothing_more_is_sealed(
    stored: Stored, tmp_path: Path, mlflow_at: str, damage: str
) -> None:
    seal(tmp_path, mlflow_at, "laws", [sealed(stored, i) for i in range(3)])
    path = tmp_path / "forecasts" / "chain.jsonl"
    if damage == "cut":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    elif damage == "emptied":
        path.write_text("")
    else:
        shutil.rmtree(path.parent)
    assert len(verified(tmp_path, mlflow_at)) == 1
    with pytest.raises(ClusterError, match="removed"):
        seal(tmp_path, mlflow_at, "laws", [sealed(stored, 9)])
    assert len(verified(tmp_path, mlflow_at)) == 1


def test_a_client_killed_before_it_queued_finds_its_forecast_again(
    stored: Stored, tmp_path: Path, mlflow_at: str
) -> None:
    config = {"seed": 3}
    pid = os.fork()
    if pid == 0:  # seals, and is killed where it would queue
        seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config)])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (first,) = Chain(tmp_path).forecasts()
    assert [f.id for f in seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config)])] == [first.id]
    assert len(Chain(tmp_path).forecasts()) == 1


def test_steps_that_were_trained_before_the_seal_score_nothing(
    stored: Stored, tmp_path: Path, mlflow_at: str
) -> None:
    config = {"seed": 1}
    old = tmp_path / "job" / "attempt-1" / "attempt.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    os.utime(old, (1.0, 1.0))
    seal(tmp_path, mlflow_at, "laws", [sealed(stored, 0, config)])
    directory = attempt(tmp_path / "job", config, number=2)
    assert score_run(tmp_path, mlflow_at, "laws", directory) == []

"""Conversions and auto-m: what may be asked for, which counts are tried, and what is said of them. No training."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from escala.contract import handshake
from escala.contract.errors import SpecError, ToleranceNotMet
from escala.contract.records import AttemptFiles, AttemptSpec, write_json
from escala.schema import AutoFeaturesConfig, ConvertConfig, ModelConfig
from escala.schema.flops import (
    attention_parameters,
    flops_per_token,
    step_flops_per_token,
    training_flops_per_token,
    transfer_flops_per_token,
)
from escala.spec import load_job
from escala.tracking.lineage.lifecycle import LiveAttempt
from escala.tracking.spool import read_events
from escala.tracking.tracker import open_tracker
from workloads import auto_features
from workloads.auto_features import Search, spec_of, summarise
from workloads.training.entry import Prepared
from workloads.training.report import Reporter

START = {"path": "/a/start"}
SMALL = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}


def test_the_model_is_the_starts_with_another_attention() -> None:
    config = ConvertConfig(start=START, model=SMALL, attention="window", window_tokens=64)
    assert (config.model.attention.kind, config.model.window_tokens) == ("window", 64)
    assert config.start_model == ModelConfig(**SMALL)
    assert ConvertConfig(**config.model_dump(mode="json")) == config  # an attempt's spec has both
    assert config.model_copy(update={"transfer_fraction": 0.25}).transfer_steps == 25


@pytest.mark.parametrize(
    "written",
    [
        {"attention": "nystrom"},
        {"attention": {"kind": "nystrom", "landmarks": 8}},
        {"attention": "exact", "window_tokens": 64},  # as an import says it: a window
        {"attention": "features", "features": {"kind": "learned", "count": 16}},
    ],
)
@pytest.mark.parametrize("mode", ["json", "python"])
def test_what_was_resolved_is_read_again_as_it_is(written: dict[str, Any], mode: str) -> None:
    config = ConvertConfig(start=START, model=SMALL, **written)
    assert ConvertConfig(**config.model_dump(mode=mode)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "exact"}, "exact already"),
        ({"attention": "window", "features": {"count": 8}}, "has no features"),
        ({"data": {"tokenizer": {"vocab_size": 300}}}, "start's own tokenizer"),
        ({"model": {**SMALL, "attention": "features"}}, "only an exact model"),
        ({"model": {**SMALL, "moe": {"experts": 4, "chosen": 2}}}, "dense"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**{"start": START, "model": SMALL, **changes})


def test_a_start_that_is_not_exact_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.parent.mkdir()
    write_json(manifest, {"config": {"model": {**SMALL, "attention": "features"}}})
    with pytest.raises(SpecError, match="attention features; only an exact model"):
        load_job("convert", overrides=[f"start.path={tmp_path}"])


def test_flops_count_the_exact_models_pass_and_no_gradients_of_frozen_weights() -> None:
    config = ConvertConfig(start=START, model=SMALL, attention="window", window_tokens=64)
    full, context = flops_per_token(config.model, config.context_tokens), config.context_tokens
    own = attention_parameters(config.model)
    frozen = 2 * (3 * 2 * 64 * config.model.ff_size + 512 * 64)
    exact = flops_per_token(ModelConfig(**SMALL), context).total / 3
    assert own == 2 * 2 * 64 * (4 + 2) * 16
    of_loss = full.total - frozen + exact
    assert step_flops_per_token(config, 1) == pytest.approx(of_loss)
    forward = flops_per_token(ModelConfig(**SMALL), context)
    transfer = (forward.total - forward.logits) / 3 + 6 * own + full.attention
    assert transfer_flops_per_token(config) == pytest.approx(transfer)
    assert training_flops_per_token(config) == pytest.approx((of_loss + transfer) / 2)


def test_counts_double_from_the_first_up_to_the_cap() -> None:
    config = AutoFeaturesConfig(start=START, model=SMALL)
    assert config.counts == [32, 64, 128, 256, 512]
    assert (config.model.features, config.model.attention.kind) == (config.features, "hybrid")
    assert config.features is not None
    assert config.features.kind == "learned"
    other = AutoFeaturesConfig(
        start=START, model=SMALL, features={"kind": "positive", "count": 24}, max_count=100
    )
    assert other.counts == [24, 48, 96]
    larger = other.with_count(96)
    assert type(larger) is ConvertConfig
    assert larger.model.features == larger.features
    assert larger.features.count == 96
    assert larger.start_model == ModelConfig(**SMALL)
    with pytest.raises(ValueError, match="above max_count"):
        AutoFeaturesConfig(start=START, model=SMALL, max_count=16)


@pytest.mark.parametrize(
    ("gaps", "chosen"),
    [({}, None), ({32: 0.3, 64: 0.06}, None), ({32: 0.3, 64: 0.05}, 64), ({32: -0.01}, 32)],
)
def test_the_first_count_within_the_tolerance_is_chosen(gaps: dict[int, float], chosen: int | None) -> None:
    assert Search(0.05, gaps).chosen == chosen


@pytest.fixture
def attempt(tmp_path: Path) -> LiveAttempt:
    """Of a job whose counts are 4, 8 and 16."""
    files = AttemptFiles(tmp_path / "attempt-1")
    files.directory.mkdir()
    config = AutoFeaturesConfig(start=START, model=SMALL, features={"count": 4}, max_count=16)
    spec = AttemptSpec(
        "job", 1, "t", "auto_features", "workloads.auto_features", config.model_dump(mode="json"),
        str(files.directory), str(tmp_path / "checkpoints"), str(tmp_path / "data"), f"spool:{files.spool}", "tests",
        remaining_flops=100.0, versions=handshake.versions(),
    )  # fmt: skip
    return LiveAttempt(spec)


def gaps_are(gaps: dict[int, float], seen: list[AttemptSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let conversions find these gaps, at 10 FLOPs each; `seen`: their specs."""

    def convert(attempt: LiveAttempt, spec: AttemptSpec, prepared: Prepared) -> dict[str, Any]:
        seen.append(spec)
        gap = gaps[spec.config["features"]["count"]]
        facts = {"outcome": "succeeded", "measures": {"gap_after_nats": gap}, "attempt_flops": 10.0}
        write_json(attempt.files.facts, facts)
        return facts

    class Alone:
        def init(self, **options: Any) -> None:
            """No cluster."""

    prepared = Prepared("", Path(), {"corpus": "c", "tokenizer": "t", "evaluation": "e"})
    monkeypatch.setitem(__import__("sys").modules, "ray", Alone())
    monkeypatch.setattr(auto_features, "convert", convert)
    monkeypatch.setattr(auto_features, "prepare", lambda spec, config: prepared)
    monkeypatch.setattr(auto_features, "NodeWatch", lambda: None)
    monkeypatch.setattr(auto_features, "stop_on_sigterm", lambda files: None)
    monkeypatch.setattr(auto_features, "publish", lambda spec, job, prepared: None)


def test_counts_are_tried_until_one_is_close_enough(
    attempt: LiveAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[AttemptSpec] = []
    gaps_are({4: 0.4, 8: 0.05, 16: 0.0}, seen, monkeypatch)
    with attempt:
        auto_features.search(attempt)
    assert [one.config["features"]["count"] for one in seen] == [4, 8]
    assert [Path(one.checkpoints).name for one in seen] == ["count-4", "count-8"]
    assert [one.remaining_flops for one in seen] == [100.0, 90.0]
    assert seen[1].metric_prefix == "count_8/"
    record = attempt.outcome.record
    assert (attempt.exit_code, attempt.outcome.kind) == (0, "succeeded")
    assert record is not None
    assert record["attempt_flops"] == 20.0
    assert record["measures"] == {
        "gap_after_nats": 0.05, "gap_at_4_nats": 0.4, "gap_at_8_nats": 0.05, "chosen_count": 8.0,
    }  # fmt: skip


def test_past_the_cap_it_refuses_with_the_numbers(
    attempt: LiveAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps_are({4: 0.4, 8: 0.3, 16: 0.25}, [], monkeypatch)
    with attempt:
        auto_features.search(attempt)
    assert attempt.exit_code == ToleranceNotMet.exit_code
    assert attempt.outcome.kind == "user_error"
    assert "4: 0.4000, 8: 0.3000, 16: 0.2500" in attempt.outcome.message
    record = attempt.outcome.record
    assert record is not None
    assert record["measures"]["gap_at_16_nats"] == 0.25
    assert "chosen_count" not in record["measures"]


def test_one_count_is_not_confused_with_another_in_the_runs_metrics(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    run = open_tracker(f"spool:{spool}").start("key", "tests", "t", {}, {})
    spec = AttemptSpec("job", 1, "t", "convert", "", {}, str(tmp_path), "", "", f"spool:{spool}", "tests")
    reporter = Reporter(replace(spec, metric_prefix="count_8/"), run)
    reporter.metrics(1, {"train_loss_nats": 2.0})
    reporter.flush()
    points = [point for event in read_events(spool) for point in event.get("points") or []]
    assert [point[0] for point in points] == ["count_8/train_loss_nats"]


def test_the_sum_of_what_was_spent_leaves_out_what_is_unknown() -> None:
    found = Search(0.1)
    found.add_spent({"attempt_flops": 1.0, "energy_joules": None})
    found.add_spent({"attempt_flops": 2.0, "cost_usd": 3.0})
    assert found.spent == {"attempt_flops": 3.0, "cost_usd": 3.0}


def test_a_counts_spec_is_a_conversion(attempt: LiveAttempt) -> None:
    config = AutoFeaturesConfig(**attempt.spec.config)
    spec = spec_of(attempt.spec, config, 8, Search(0.1))
    same = {k: v for k, v in asdict(spec).items() if v == asdict(attempt.spec)[k]}
    assert (spec.workload, spec.entry_point) == ("convert", "workloads.convert")
    assert {"directory", "tracking_uri", "job_id", "attempt", "data"} <= same.keys()
    assert summarise(Search(0.1, {4: 0.2}), attempt).values["measures"] == {"gap_at_4_nats": 0.2}

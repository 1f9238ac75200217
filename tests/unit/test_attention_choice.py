"""Where a kind of attention overtakes exact, and what `model.attention: auto` becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from escala import Escala, documents
from escala.contract.errors import EscalaError, NotFoundError, SpecError
from escala.jobs import attention
from escala.jobs.identity import spec_hash
from escala.jobs.records import CHOSEN_TAG
from escala.schema import AttentionBenchConfig, PretrainConfig
from escala.schema.attention.choice import AttentionChoice, Pilot, choose
from escala.schema.attention.speed import AttentionSpeed, KindSpeed, overtakes, with_overtaking
from escala.settings import Settings
from escala.sweeps.space import Space, contexts

LAYER = {"heads": 4, "head_size": 64, "window_tokens": 512, "features": 256}
KINDS = {
    "exact": {"train": {1024: 1.0, 4096: 16.0}},
    "window": {"train": {1024: 1.0, 4096: 4.0}, "train_overtakes": 1024},
    "hybrid": {"train": {1024: 2.0, 4096: 8.0}, "train_overtakes": 2048},
}
TABLE = AttentionSpeed.model_validate({**LAYER, "kinds": KINDS, "source": "run 7"})
HERE = Path(__file__).parents[2] / "clusters" / "local.yaml"


def pilot(mass: float, window: int = 512) -> Pilot:
    return Pilot("first", window, mass, 4096)


@pytest.mark.parametrize(
    ("seconds", "exact", "at"),
    [
        ({1: 2.0, 4: 4.0}, {1: 1.0, 4: 8.0}, 2),  # the ratio falls from 2 to 1/2: it is 1 in the middle
        ({1: 1.0, 4: 2.0}, {1: 1.0, 4: 8.0}, 1),
        ({1: 1.0, 4: 2.0}, {1: 2.0, 4: 8.0}, 1),  # faster everywhere
        ({1: 1.0, 4: 9.0}, {1: 2.0, 4: 8.0}, None),  # only below
        ({1: 1.0, 2: 5.0, 8: 8.0}, {1: 2.0, 2: 2.5, 8: 16.0}, 4),  # a slow place in between counts
        ({1: 1.0}, {2: 3.0}, None),  # nothing in common
    ],
)
def test_overtaking(seconds: dict[int, float], exact: dict[int, float], at: int | None) -> None:
    assert overtakes(seconds, exact) == at


def test_a_table_says_where_each_overtakes_exact_in_training_and_in_decoding() -> None:
    found = with_overtaking(
        {
            "exact": KindSpeed(train={1: 1.0, 4: 16.0}, decode={1: 1.0, 4: 4.0}),
            "window": KindSpeed(train={1: 2.0, 4: 8.0}, decode={1: 2.0, 4: 2.0}),
        }
    )
    assert (found["window"].train_overtakes, found["window"].decode_overtakes) == (2, 2)
    assert found["exact"].train_overtakes is None


@pytest.mark.parametrize(
    ("context", "seen", "kind", "why"),
    [
        (512, None, "exact", "not above the window"),
        (2047, None, "exact", "below the T 2048"),
        (2048, None, "hybrid", "no pilot"),
        (2047, pilot(0.95), "window", "95.0% of the attention mass"),
        (2048, pilot(0.94), "hybrid", "below 95%"),
        (1023, pilot(0.99), "exact", "below the T 1024"),
    ],
)
def test_the_rule(context: int, seen: Pilot | None, kind: str, why: str) -> None:
    found = choose(context, None, TABLE, "fp32", seen)
    assert found.kind == kind
    assert why in found.reason
    assert found.window_tokens == (None if kind == "exact" else 512)
    assert kind == "exact" or "run 7" in found.reason or "first" in found.reason


def test_what_never_overtakes_is_not_chosen() -> None:
    kinds = {**KINDS, "hybrid": {"train": {4096: 99.0}}}
    table = AttentionSpeed.model_validate({**LAYER, "kinds": kinds, "source": "run 7"})
    assert choose(10**6, None, table, "fp32").reason.startswith("up to T 4096 hybrid does not overtake")


def test_without_a_table_only_a_short_context_can_be_decided() -> None:
    assert choose(256, None, None, "fp32").kind == "exact"
    with pytest.raises(SpecError, match="no such table") as caught:
        choose(512, None, None, "bf16", device="the cluster there")
    assert "escala bench attention --precision bf16" in caught.value.hint


def test_a_pilot_of_another_window_decides_nothing() -> None:
    with pytest.raises(SpecError, match=r"window of 256 tokens, and model\.window_tokens is 512"):
        choose(4096, 512, TABLE, "fp32", pilot(0.99, 256))
    assert choose(4096, None, TABLE, "fp32", pilot(0.99, 256)) == AttentionChoice(
        "window", choose(4096, 256, TABLE, "fp32", pilot(0.99, 256)).reason, 256
    )


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home without a cluster, and a cluster's file with the table."""
    data = documents.read_yaml(HERE)
    data["device"]["attention"] = {"fp32": {**LAYER, "kinds": KINDS, "source": "run 7"}}
    path = tmp_path / "mine.yaml"
    path.write_text(documents.dump(data))
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ESCALA_CLUSTER", str(path))
    monkeypatch.delenv("ESCALA_DATABASE_URL", raising=False)
    return Settings()


LONG = ["model.attention=auto", "model.max_context_tokens=4096"]


def test_a_spec_has_the_kind_and_the_reason(settings: Settings) -> None:
    found = Escala(settings).resolve("pretrain", overrides=LONG)
    assert found.spec["model"]["attention"] == "hybrid"
    assert found.spec["model"]["window_tokens"] == 512
    assert found.derived["model.attention"].startswith("hybrid: T 4096 is not below the T 2048")
    short = [*LONG[:1], "model.max_context_tokens=256", "model.window_tokens=512", "model.features.count=64"]
    model = Escala(settings).resolve("pretrain", overrides=short).spec["model"]
    assert (model["attention"], model["window_tokens"], model["features"]) == ("exact", None, None)


def test_a_budget_s_recipe_gets_the_kind(settings: Settings) -> None:
    found = Escala(settings).resolve("pretrain", overrides=LONG, compute_flops=1e15)
    assert found.spec["model"]["attention"] == "hybrid"


def test_a_pilot_by_its_measures(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {
        "near": {
            "measures": {"attention_mass_in_window": 0.97, "attention_window_tokens": 512.0},
            "context_tokens": 4096,
        },
        "silent": {"measures": None, "context_tokens": 4096},
    }
    monkeypatch.setattr(attention, "_record", lambda settings, name: records[name])
    found = Escala(settings).resolve("pretrain", overrides=[*LONG, "attention_pilot=near"])
    assert found.spec["model"]["attention"] == "window"
    with pytest.raises(SpecError, match="silent has not measured") as caught:
        Escala(settings).resolve("pretrain", overrides=[*LONG, "attention_pilot=silent"])
    assert "measure_attention_window" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["attention_pilot=first"], SpecError, "model.attention is not auto"),
        ([*LONG, "training.precision=bf16"], SpecError, "in bf16, and the cluster"),
    ],
)
def test_what_cannot_be_decided_is_said(
    settings: Settings, overrides: list[str], error: type[EscalaError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Escala(settings).resolve("pretrain", overrides=overrides)


def test_the_largest_context_of_a_space_decides_for_all(settings: Settings, tmp_path: Path) -> None:
    vary = {"context_tokens": [256, 4096], "n_total": [2_000_000]}
    base = {"model": {"attention": "auto"}, "training": {"steps": 3}}
    path = tmp_path / "long.yaml"
    path.write_text(documents.dump({"vary": vary, "base": base}))
    plan = Escala(settings).plan_sweep(str(path))
    assert plan.chosen["model.attention"].startswith("hybrid: T 4096")
    assert {t.config["model"]["attention"] for t in plan.trials} == {"hybrid"}
    ranged = {"vary": {"training.context_tokens": {"low": 64, "high": 128, "count": 2}}, "cells": [{}]}
    assert max(contexts(Space.model_validate(ranged))) == 128


def test_the_reason_is_no_part_of_what_was_asked() -> None:
    row = dict.fromkeys(("workload", "entry_point", "name", "priority", "retries", "after"))
    row |= dict.fromkeys(("max_flops", "max_seconds", "resume_from", "parent", "experiment"))
    rows = [
        {**row, "config": {}, "tags": {f"{CHOSEN_TAG}model.attention": why, "a": "b"}} for why in ("x", "y")
    ]
    assert spec_hash(rows[0]) == spec_hash(rows[1])


def test_only_exact_attention_over_more_than_the_window_can_be_measured() -> None:
    with pytest.raises(ValueError, match="needs exact attention"):
        PretrainConfig.model_validate({"model": {"attention": "window"}, "measure_attention_window": 16})
    with pytest.raises(ValueError, match="leaves nothing outside"):
        PretrainConfig(measure_attention_window=256)


def test_a_bench_of_attention_is_checked() -> None:
    with pytest.raises(ValueError, match="no attention 'best'"):
        AttentionBenchConfig(kinds=["best"])
    with pytest.raises(ValueError, match="one worker measures"):
        AttentionBenchConfig.model_validate({"resources": {"workers": 2}})
    layer = AttentionBenchConfig(features=64).layer("hybrid")
    assert layer.features is not None
    assert (layer.features.count, layer.window_tokens) == (64, 512)


def test_a_table_needs_a_cluster_s_file_with_a_device(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no cluster's file"):
        Escala(settings).check_bench_file(tmp_path / "nowhere.yaml")
    named = tmp_path / "named.yaml"
    named.write_text("device: h100\ndevices: 8\n")
    with pytest.raises((SpecError, NotFoundError)):
        Escala(settings).check_bench_file(named)
    Escala(settings).check_bench_file(Path(settings.cluster))

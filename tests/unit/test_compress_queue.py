"""`escala compress` before its job runs: what it takes, what it refuses, what is queued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from escala import Escala
from escala.contract.errors import NotFoundError, SpecError
from escala.contract.records import Rates
from escala.jobs import compress
from escala.jobs.store import JobStore
from escala.schema import CompressConfig, ModelConfig
from escala.schema.pretrained import to_hugging_face
from escala.settings import Settings

MODEL = ModelConfig(vocab_size=64, n_layers=1, d_model=32, n_heads=2, max_context_tokens=64)
NO_RATES = Rates("c", None, None, 1.0, None, None, None)


class _Cluster:
    def __init__(self, rates: Rates) -> None:
        self._rates = rates

    def rates(self) -> Rates:
        return self._rates


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a cluster, and a model's directory in it."""
    from escala import cluster

    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    for name in ("ESCALA_DATABASE_URL", "ESCALA_RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "up", lambda *_: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(to_hugging_face(MODEL)))
    return tmp_path


def _queued(job_id: str) -> Any:
    store = JobStore(Settings().database_url)
    try:
        return store.get(job_id)
    finally:
        store.close()


def test_a_path_is_queued_with_its_model(home: Path) -> None:
    view = Escala().compress(
        str(home / "model"), {"loss_budgets": [0.1, 0.01]}, ["tokens=512"], {"name": "small"}
    )
    job = _queued(view.id)
    assert (job.workload, job.name) == ("compress", "small")
    assert job.config["model"]["d_model"] == 32
    assert (job.config["loss_budgets"], job.config["tokens"]) == ([0.1, 0.01], 512)
    # and a job is found by its name; it has not ended, so the next one waits for it
    assert _queued(Escala().compress("small").id).after == job.id


def test_what_is_neither_path_nor_job_is_refused(home: Path) -> None:
    with pytest.raises(NotFoundError, match="no path, no job and no run 'nowhere'"):
        Escala().compress("nowhere")


def test_joules_need_coefficients(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "load_cluster", lambda _: _Cluster(NO_RATES))
    with pytest.raises(SpecError, match="states no joules_per_byte"):
        Escala().compress(str(home / "model"), {"objective": "joules"})
    stated = replace(NO_RATES, joules_per_byte=1e-11, joules_per_flop=1e-12)
    monkeypatch.setattr(compress, "load_cluster", lambda _: _Cluster(stated))
    assert Escala().compress(str(home / "model"), {"objective": "joules"}).state == "queued"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"loss_budgets": [0.0]}, "above 0"),
        ({"loss_budgets": [0.1, 0.1]}, "given twice"),
        ({"rank_shares": [1.0]}, "share of the rank"),
        ({"resources": {"workers": 2}}, "one worker"),
        ({"text": "a.txt", "data": {}}, "not both"),
        ({"context_tokens": 128}, "longer than model.max_context_tokens"),
        ({"bits": [7]}, "bits"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        CompressConfig(**{"start": {"path": "/m"}, "model": MODEL, **asked})

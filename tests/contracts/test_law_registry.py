"""The laws' registry on a real MLflow database: versions, champion, provenance, files, the pyfunc model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from escala.contract.errors import LawError, NotFoundError
from escala.laws import Law, fit_law, load_law
from escala.laws.registry import Registry
from escala.tracking.lineage import code_fingerprint

POINT = {"n_active": 1e9, "tokens": 2e10}


def table(n: int = 24, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    compute, ratio = 10 ** rng.uniform(17, 20, n), 20 * 10 ** rng.uniform(-0.75, 0.75, n)
    frame = pd.DataFrame({"n_active": np.sqrt(compute / 6 / ratio)})
    frame["tokens"] = compute / 6 / frame.n_active
    clean = 1.8172 + 482.01 * frame.n_active**-0.3478 + 2085.43 * frame.tokens**-0.3658
    frame["loss_nats"] = clean * np.exp(0.003 * rng.standard_normal(n))
    return frame.assign(run_id=[f"run{i}" for i in range(n)], tokenizer_fingerprint="tok1")


@dataclass(frozen=True)
class Place:
    """A tracker and a home with three versions of one law: healthy, unhealthy, healthy."""

    uri: str
    home: Path
    first: Law
    unhealthy: Law

    def registry(self, home: Path | None = None) -> Registry:
        return Registry(self.uri, home or self.home)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("laws")
    uri, home = f"sqlite:///{root}/mlflow.db", root / "home"
    points = table()
    first = fit_law(points, bootstrap=40)
    unhealthy = fit_law(points.assign(tokens=20 * points.n_active), bootstrap=40)
    assert first.healthy
    assert not unhealthy.healthy
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # MLflow puts a database's artifacts under the working directory
        patch.setenv("ESCALA_HOME", str(home))
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        common: Any = {"experiment": "laws", "by": "somebody"}
        place = Place(uri, home, first, unhealthy)
        save = place.registry().save
        assert save(first, "small", **common, sources=["points.csv sha256=0"]) == 1
        assert save(unhealthy, "small", **common) == 2
        assert save(fit_law(table(seed=1), bootstrap=40), "small", **common) == 3
        yield place


@pytest.fixture
def client(place: Place) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(place.uri)


def test_the_first_healthy_version_is_champion_until_somebody_promotes(place: Place, tmp_path: Path) -> None:
    rows = place.registry().versions("small")
    assert [(row.version, row.champion, row.healthy) for row in rows] == [
        (3, False, True),
        (2, False, False),
        (1, True, True),
    ]
    other = place.registry(tmp_path / "another home")
    assert other.load("small").version == 1
    place.registry().promote("small@3")
    assert place.registry().load("small").version == 3
    assert other.load("small").version == 1  # its pointer is its own ...
    assert other.load("small", refresh=True).version == 3  # ... until it asks
    assert other.load("small").version == 3
    place.registry().promote("small@1")
    assert load_law("small").parameters == place.first.parameters


def test_an_unhealthy_law_is_kept_and_is_champion_only_by_force(place: Place) -> None:
    registry = place.registry()
    stored = registry.load("small@2")
    assert not stored.law.healthy
    assert stored.law.findings == place.unhealthy.findings
    with pytest.raises(LawError, match="not healthy"):
        registry.promote("small@2")
    assert registry.load("small", refresh=True).version == 1
    registry.promote("small@2", force=True)
    assert registry.load("small", refresh=True).version == 2
    registry.promote("small@1")


def test_a_name_without_a_healthy_version_has_no_champion(place: Place) -> None:
    place.registry().save(place.unhealthy, "sick", experiment="laws", by="somebody")
    with pytest.raises(NotFoundError, match="no champion"):
        load_law("sick")
    assert load_law("sick@1").findings == place.unhealthy.findings


def test_a_law_comes_back_exactly_from_the_tracker_and_from_the_cache(place: Place, tmp_path: Path) -> None:
    for home in (tmp_path, tmp_path, place.home):
        law = place.registry(home).load("small@1").law
        assert law.to_json() == place.first.to_json()
    assert (tmp_path / "laws" / "small" / "1.json").read_text() == place.first.to_json()


def test_the_run_holds_parameters_health_and_provenance(place: Place, client: Any) -> None:
    stored = place.registry().load("small@1")
    run = client.get_run(stored.provenance["law_run_id"])
    low, high = place.first.intervals(0.9)["alpha"]
    metrics = run.data.metrics
    assert metrics["alpha"] == pytest.approx(place.first.parameters["alpha"], rel=1e-12)
    assert (metrics["alpha_low"], metrics["alpha_high"]) == pytest.approx((low, high), rel=1e-12)
    assert metrics["healthy"] == 1.0
    assert run.info.status == "FINISHED"
    assert run.data.params["form"] == "nd"
    assert run.data.tags["escala.by"] == "somebody"
    assert json.loads(run.data.tags["escala.sources"]) == ["points.csv sha256=0"]
    assert run.data.tags["escala.code_fingerprint"] == code_fingerprint().fingerprint
    assert run.data.tags["escala.tokenizer_fingerprint"] == "tok1"
    assert stored.provenance["run_ids"] == [f"run{i}" for i in range(24)]
    names = {item.path for path in (None, "plots") for item in client.list_artifacts(run.info.run_id, path)}
    assert {"law.json", "points.csv", "provenance.json", "model"} <= names
    assert {"plots/loss_against_tokens.png", "plots/isoflop.png", "plots/residuals.png"} <= names


def test_the_run_says_what_the_law_is(place: Place, client: Any) -> None:
    for version, law, health in ((1, place.first, "healthy"), (2, place.unhealthy, "NOT healthy")):
        stored = place.registry().load(f"small@{version}")
        run = client.get_run(stored.provenance["law_run_id"])
        note = run.data.tags["mlflow.note.content"]
        assert run.info.run_name == f"small@{version}, {health}"
        assert f"| alpha | {law.parameters['alpha']:.5g} |" in note
        assert law.form.formula in note
        assert all(finding in note for finding in law.findings)
        assert f"escala laws predict small@{version} --at n_active=" in note
        assert client.get_model_version("small", str(version)).description == note
    (used,) = client.get_run(place.registry().load("small@1").provenance["law_run_id"]).inputs.dataset_inputs
    assert used.dataset.name == "points.csv sha256=0"
    assert json.loads(used.dataset.profile)["num_rows"] == 24


def test_a_client_that_dies_leaves_no_run_running(
    place: Place, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all of a law's run is there it is KILLED; what died before it could say so is ended by the next fit."""
    from escala.laws import registry as module

    def laws_runs() -> dict[str, str]:
        found = client.search_runs([client.get_experiment_by_name("dying").experiment_id])
        return {run.info.run_id: run.info.status for run in found}

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        assert set(laws_runs().values()) == {"KILLED"}
        raise Killed

    common: Any = {"experiment": "dying", "by": "somebody"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_artifacts", dies)
        with pytest.raises(Killed):
            place.registry().save(place.first, "dying", **common)
    assert "RUNNING" not in laws_runs().values()
    experiment = client.get_experiment_by_name("dying").experiment_id

    def running(key: str, at: int | None) -> str:
        return str(client.create_run(experiment, at, {"escala.key": key}).info.run_id)

    here, dead = f"law:{socket.gethostname()}", subprocess.Popen(["true"])
    dead.wait()
    ended = [running("law:elsewhere:1:0", 1), running(f"{here}:{dead.pid}:0", None)]
    left = [running("law:elsewhere:1:1", None), running(f"{here}:{os.getpid()}:0", None), running("job-1", 1)]
    place.registry().close_abandoned("dying")
    assert [laws_runs()[run] for run in ended + left] == ["KILLED"] * 2 + ["RUNNING"] * 3
    place.registry().close_abandoned("absent")


def test_a_law_without_intervals_is_never_champion(place: Place, client: Any) -> None:
    one = fit_law(table().assign(family="one"), group="family", bootstrap=40)
    common: Any = {"experiment": "laws", "by": "somebody"}
    assert place.registry().save(one, "alone", **common) == 1
    with pytest.raises(NotFoundError, match="no champion"):
        place.registry().load("alone")
    with pytest.raises(LawError, match="no intervals: 1 group"):
        place.registry().promote("alone@1")
    note = client.get_run(place.registry().load("alone@1").provenance["law_run_id"]).data.tags
    assert "| alpha |" in note["mlflow.note.content"]
    assert "| none |" in note["mlflow.note.content"]


def test_the_champion_is_a_pyfunc_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import mlflow

    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's own code first
    model = mlflow.pyfunc.load_model("models:/small@champion")
    answer = model.predict(pd.DataFrame([POINT, POINT]), params={"level": 0.8})
    expected = place.first.predict(0.8, **POINT)
    assert answer.loss_nats.tolist() == [expected.loss_nats] * 2
    assert answer.low_nats[0] == expected.low_nats
    assert answer.farthest[0] == expected.farthest > 1


def test_a_law_that_escala_0_1_registered_is_listed_and_loaded(
    place: Place, client: Any, tmp_path: Path
) -> None:
    """Its version has a tag for each fact, and its provenance the configuration as dotted keys and texts."""
    written = {"law.json": place.first.to_json()}
    written["provenance.json"] = json.dumps({"by": "she", "configuration": {"model.n_layers": "2"}})
    run = client.create_run(client.create_experiment("laws of 0.1")).info.run_id
    for name, text in written.items():
        client.log_text(run, text, name)
    facts = {"form": "nd", "size": "n_active", "healthy": "true", "points": "24", "by": "she"}
    facts |= {"kind": "law", "created_at": "12.5"}
    tags = {f"escala.{key}": text for key, text in facts.items()}
    client.create_registered_model("old", tags={"escala.kind": "law"})
    source = client.get_run(run).info.artifact_uri
    client.create_model_version("old", source, run, tags=tags, await_creation_for=None)
    (row,) = place.registry().versions("old")
    assert (row.healthy, row.points, row.by, row.created_at) == (True, 24, "she", 12.5)
    stored = place.registry(tmp_path).load("old@1")
    assert stored.law.to_json() == place.first.to_json()
    assert stored.provenance["configuration"] == {"model": {"n_layers": 2}}


def test_another_tracker_is_another_registry(place: Place, tmp_path: Path) -> None:
    """The cache of one tracker's small@1 never answers for another's."""
    other = Registry(f"sqlite:///{tmp_path}/other.db", place.home)
    with pytest.raises(NotFoundError, match="small@1"):
        other.load("small@1")
    with pytest.raises(NotFoundError, match="no law small"):
        other.load("small")
    assert place.registry().load("small").version == 1


def test_what_is_not_there_is_named(place: Place, client: Any) -> None:
    registry = place.registry()
    with pytest.raises(NotFoundError, match="small@9"):
        registry.load("small@9")
    with pytest.raises(NotFoundError, match="nobody"):
        registry.load("nobody")
    client.create_registered_model("bert")
    with pytest.raises(LawError, match="no law"):
        registry.save(place.first, "bert", experiment="laws", by="somebody")
    assert {row.name for row in registry.versions()} <= {"small", "sick", "alone", "old"}

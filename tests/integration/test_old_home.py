"""A home that escala 0.1.0 made, opened by this version: jobs, runs and law, and its stopped job resumed to the end."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from escala.jobs.backends import open_backend
from escala.jobs.reconcile import Reconciler
from escala.jobs.store import JobStore
from escala.laws import load_law
from escala.runtime_env import job_variables
from escala.settings import Settings
from escala.storage.checkpoints import latest, open_checkpoints
from escala.tracking.queries import list_runs
from tests.conftest import wait_for

DATA = Path(__file__).parents[1] / "data"
EXPECTED: dict[str, Any] = json.loads((DATA / "home-0.1.0.json").read_text())
STOPPED, DONE = EXPECTED["jobs"]["stopped"], EXPECTED["jobs"]["done"]


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """The home in a place of its own; its jobs find their text there. Manifests are sealed, and say the old place."""
    with tarfile.open(DATA / "home-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    home = tmp_path / Path(EXPECTED["home_path"]).name
    with sqlite3.connect(home / "escala.db") as database:
        moved = (EXPECTED["home_path"], str(home))
        database.execute("UPDATE job SET config = replace(config, ?, ?)", moved)
    database.close()
    return home


def cpu() -> str:
    """What the kernels of torch's libraries are chosen by: the vendor, the widest vectors, the matrix unit."""
    information = Path("/proc/cpuinfo").read_text()
    vendor = next(
        (line.split(":")[1].strip() for line in information.splitlines() if line.startswith("vendor_id")), "?"
    )
    unit = "AMX" if " amx_tile " in information else "no AMX"
    return f"{vendor}, {torch.backends.cpu.get_cpu_capability()}, {unit}"


def exactly(value: float | None) -> str:
    assert value is not None
    return value.hex()


def test_jobs_runs_and_law_are_there(old_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(f"sqlite:///{old_home}/escala.db")
    for expected in (STOPPED, DONE):
        job = store.get(expected["job_id"])
        (attempt,) = store.attempts(job.id)
        assert (job.state, job.reason, job.train_tokens) == tuple(
            expected[key] for key in ("state", "reason", "train_tokens")
        )
        assert (attempt.record or {})["held_out_loss_nats"].hex() == expected["held_out_loss_nats"]
        found, refused = latest(open_checkpoints(old_home / "jobs" / job.id / "checkpoints"))
        assert found is not None
        assert (found.name, refused) == (expected["checkpoint"], [])
    store.close()

    records = list_runs(f"sqlite:///{old_home}/mlflow.db", workload="pretrain")
    runs = {record.run_id: record for record in records}
    assert runs.keys() == {*STOPPED["run_ids"], *DONE["run_ids"]}
    for expected in (STOPPED, DONE):
        record = runs[expected["run_ids"][0]]
        assert exactly(record.held_out_loss_nats) == expected["held_out_loss_nats"]
        assert exactly(record.compute_flops) == expected["compute_flops"]

    monkeypatch.setenv("ESCALA_HOME", str(old_home))
    monkeypatch.setenv("ESCALA_MLFLOW_PORT", str(EXPECTED["mlflow_port"]))  # its tracker, which is not there
    law = load_law(EXPECTED["law"]["reference"])
    assert {k: exactly(v) for k, v in law.parameters.items()} == EXPECTED["law"]["parameters"]
    predicted = law.predict(n_active=1e9, tokens=2e10)
    for name, value in EXPECTED["law"]["predict_n_active_1e9_tokens_2e10"].items():
        assert getattr(predicted, name) == pytest.approx(float.fromhex(value), rel=1e-12)


def digests(directory: Path) -> dict[str, str]:
    """FILE:TENSOR -> type, shape and hash of each tensor of a checkpoint."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118  it is no dict
                tensor = reader.get_tensor(name)
                digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                found[f"{path.name}:{name}"] = f"{tensor.dtype} {list(tensor.shape)} {digest}"
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly(minutes=1)
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("connected")
def test_a_stopped_job_is_resumed_to_the_same_loss(old_home: Path) -> None:
    settings = Settings()
    store = JobStore(f"sqlite:///{old_home}/escala.db")
    variables = job_variables(settings.gcs_address)
    reconciler = Reconciler(
        store,
        open_backend("ray", settings),
        old_home,
        lambda job: variables,
        1,
        lambda directory, lost: True,
        time.time,
    )
    job_id = store.request_retry(STOPPED["job_id"]).id

    def ended() -> bool:
        reconciler.step()
        return store.get(job_id).state in ("succeeded", "failed", "stopped")

    wait_for(ended, 240, "the job's end", every=0.5)
    log = old_home / "jobs" / job_id / "attempt-2" / "log.txt"
    assert store.get(job_id).state == "succeeded", log.read_text()[-3000:]
    assert f"{STOPPED['checkpoint']} (step 21)" in log.read_text()
    record, expected = store.attempts(job_id)[-1].record or {}, EXPECTED["undisturbed"]
    checkpoint = old_home / "jobs" / job_id / "checkpoints" / expected["checkpoint"]
    assert record["train_tokens"] == expected["train_tokens"]
    for name in ("held_out_loss_nats", "train_loss_nats"):
        assert record[name] == pytest.approx(float.fromhex(expected[name]), rel=1e-5)
    if cpu() == EXPECTED["cpu"]:  # others round in other places
        assert [record[n].hex() for n in ("held_out_loss_nats", "train_loss_nats")] == [
            expected[n] for n in ("held_out_loss_nats", "train_loss_nats")
        ]
        assert digests(checkpoint) == expected["tensors"]
    store.close()
    shutil.rmtree(old_home)

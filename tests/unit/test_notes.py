"""What MLflow's pages show of a run: its note, its data set, and the addresses that lead there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from escala.contract.records import AttemptSpec, JobFiles, RunRecord, write_json
from escala.tracking.children import FamilyDelivery
from escala.tracking.lineage.datasets import dataset_of
from escala.tracking.lineage.notes import command_tag, run_note, start_tags
from escala.tracking.pages import find_runs_page, has_running_run, run_page, runs_page, shown, table_beside
from escala.tracking.spool import SpoolTracker, read_events

MODEL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": 300}


def spec(**changes: Any) -> AttemptSpec:
    values = {
        "job_id": "j1",
        "attempt": 1,
        "name": "first",
        "workload": "pretrain",
        "entry_point": "workloads.pretrain",
        "config": {"model": MODEL},
        "directory": "",
        "checkpoints": "",
        "data": "",
        "tracking_uri": "",
        "experiment": "escala",
    }
    return AttemptSpec(**values | changes)


def record(**changes: Any) -> RunRecord:
    values = {"run_id": "r", "job_id": "j1", "attempt": 1, "name": "first", "workload": "pretrain"}
    return RunRecord(**values | {"status": "succeeded", "started_at": 0.0} | changes)


def test_the_note_of_a_finished_run_says_what_ran_what_it_cost_and_how_to_go_on() -> None:
    came = record(
        n_total=13_072, n_active=13_072, train_tokens=2_560, held_out_loss_nats=3.1546, compute_flops=2.153e8,
        cost_usd=0.25, energy_joules=7.4, energy_source="estimate", carbon_gco2e=0.5, workers=2, wall_seconds=9.0,
        tokens_per_second=1234.0, measures={"reward": 0.5},
    )  # fmt: skip
    command = {"escala.command": "escala submit pretrain x.yaml"}
    note = run_note(spec(tags=command), came, [("data", "text")], checkpoint="/home/c/step-00000020")
    lines = note.splitlines()
    assert lines[0] == "**pretrain `first`**: succeeded, 3.155 nats per token on held-out text"
    for line in (
        "| job | `j1` |",
        "| model | 2 layers of width 16, 2 heads, vocabulary 300 |",
        "| data | text |",
        "| parameters | 13,072 |",
        "| tokens | 2,560 |",
        "| reward | 0.5 |",
        "| compute | 2.153e+08 FLOPs, 1234 tokens per second |",
        "| time | 9 s, 2 workers |",
        "| cost | 0.25 USD |",
        "| energy | 7.4 J, 0.5 g CO2e, estimate |",
        "| last checkpoint | `/home/c/step-00000020` |",
        "escala submit pretrain x.yaml",
    ):
        assert line in lines
    assert "escala export j1 --to DIRECTORY" in note
    assert "escala jobs resume j1 --set training.steps=STEPS" in note
    assert "retry" not in note


def test_the_note_of_a_failed_run_says_why_and_what_to_do() -> None:
    note = run_note(
        spec(attempt=3), record(status="out_of_memory", reason="too *big* | a\nb"), hint="use `less`"
    )
    assert note.startswith(
        "**pretrain `first`**: out of memory\n\n> too \\*big\\* \\| a b\n>\n> use \\`less\\`"
    )
    assert "| job | `j1`, attempt 3 |" in note
    assert "escala jobs retry j1" in note
    assert "export" not in note


def test_the_note_of_a_run_at_work_and_of_trials_and_sweeps() -> None:
    assert "escala logs -f j1" in start_tags(spec())["mlflow.note.content"]
    trial = spec(tags={"escala.trial": "f", "escala.sweep": "smoke", "escala.command": "escala sweep smoke"})
    note = run_note(trial, record())
    assert "| trial | of the sweep `smoke`, job `j1` |" in note
    assert "escala laws fit --sweep j1 --name NAME" in note
    sweep = spec(workload="sweep", config={"axes": {}})
    assert start_tags(sweep)["mlflow.source.name"] == "escala sweep"
    assert "escala laws fit --sweep j1 --name NAME" in run_note(sweep, record(status="succeeded"))


def test_a_note_fits_into_a_tag_whatever_people_wrote() -> None:
    note = run_note(
        spec(name="`|\n# x" * 5000, tags={"escala.command": "```" * 9000}),
        record(reason="|" * 90_000),
        [("x", "y" * 90_000)],
        hint="h" * 90_000,
    )
    assert len(note) <= 8000


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["/venv/bin/escala", "submit", "pretrain", "my file.yaml"], "escala submit pretrain 'my file.yaml'"),
        (["/lib/escala/__main__.py", "sweep", "smoke"], "escala sweep smoke"),
        (
            ["escala", "submit", "sft", "--set", "data.train=s3://user:hunter2@host/x?token=hunter2&a=1"],
            "escala submit sft --set 'data.train=s3://user:***@host/x?token=***&a=1'",
        ),
        (["ipykernel_launcher.py", "-f", "x"], None),
        ([], None),
    ],
)
def test_the_command_is_kept_without_passwords(typed: list[str], kept: str | None) -> None:
    assert command_tag(typed).get("escala.command") == kept


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            {"data": {"corpora": [{"kind": "python_source"}, {"kind": "files", "root": "/a/books"}]}},
            "python_source+books",
        ),
        ({"data": {"corpora": [{"kind": "huggingface", "name": "who/wiki"}]}}, "wiki"),
        ({"data": {"train": "/a/pairs.jsonl"}}, "pairs.jsonl"),
        ({"prompts": "/a/prompts.jsonl"}, "prompts.jsonl"),
    ],
)
def test_a_data_set_is_named_by_what_was_given(config: dict[str, Any], name: str) -> None:
    found = dataset_of(config, {"corpus": "abc", "tokenizer": "def"})
    assert (found.name, found.digest, found.source) == (name, "abc", config)
    assert found.profile == {"corpus_fingerprint": "abc", "tokenizer_fingerprint": "def"}


def test_addresses_lead_to_the_table_of_runs_and_hold_no_password() -> None:
    uri = "http://user:pass@host:5000/mlflow/"
    page = run_page(uri, "7", "abc")
    assert page == "http://host:5000/mlflow/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert table_beside(page) == runs_page(uri, "7")
    assert runs_page(uri, "7") == "http://host:5000/mlflow/#/experiments/7/runs?workflowType=machine_learning"
    assert shown("http://127.0.0.1:5099") == "http://127.0.0.1:5099"


@pytest.fixture
def tracker() -> Iterator[str]:
    """The address of what answers like MLflow: one experiment, "my runs", with one running run, whose key is law:1."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("get-by-name?experiment_name=my+runs"):
                self.answer(200, {"experiment": {"experiment_id": "3"}})
            else:
                self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "RUNNING" not in asked["filter"] or asked["experiment_ids"] != ["3"]:
                self.answer(400, {"error_code": "INVALID_PARAMETER_VALUE"})
            else:
                self.answer(200, {"runs": [{}]} if "`key` LIKE 'law:%'" in asked["filter"] else {})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_table_of_an_experiment_is_found_by_its_name(tracker: str) -> None:
    assert find_runs_page(tracker, "my runs") == runs_page(tracker, "3")
    assert find_runs_page(tracker, "others") is None
    assert find_runs_page("http://127.0.0.1:9", "my runs") is None
    assert find_runs_page("sqlite:///x.db", "my runs") is None


def test_whether_runs_are_running_is_asked_without_mlflows_client(tracker: str) -> None:
    assert has_running_run(tracker, "my runs", "key", "law:") is True
    assert has_running_run(tracker, "my runs", "key", "job:") is False
    assert has_running_run(tracker, "others", "key", "law:") is False
    assert has_running_run("sqlite:///x.db", "my runs", "key", "law:") is None
    with pytest.raises(OSError, match="refused"):
        has_running_run("http://127.0.0.1:9", "my runs", "key", "law:")


def test_the_note_of_a_killed_attempt_says_so(tmp_path: Path) -> None:
    class Away:
        def deliver(self, *_: object) -> bool:
            return False

    files = JobFiles(tmp_path, "j1").attempt(1)
    files.directory.mkdir(parents=True)
    write_json(files.spec, spec())
    spool = SpoolTracker(files.spool)
    spool.start("j1-1", "escala", "first", start_tags(spec()), {})
    for _ in range(2):  # a second reconcile loop adds nothing
        FamilyDelivery(cast(Any, Away()), tmp_path).deliver(files.directory, lost=True)
    tags, finish = list(read_events(files.spool))[1:]
    assert tags["tags"]["mlflow.note.content"].startswith(
        "**pretrain `first`**: driver lost\n\n> its driver was killed"
    )
    assert finish["status"] == "FAILED"

"""No password in what is shown, logged or sent to the tracker, whatever part of a URL holds it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from escala.contract import redaction
from escala.contract.errors import EscalaError, SpecError
from escala.contract.redaction import hide, hide_arguments, hide_in
from escala.jobs.database import open_engine
from escala.jobs.records import NewJob
from escala.jobs.store import JobStore
from escala.runtime_env import job_variables
from escala.settings import Settings
from escala.tracking.mlflow_tracker import MlflowTracker

SECRET = "s3cr3t-Pw"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:{}@host:5432/db",
        "postgresql+psycopg://u:{}/with@at@host/db?sslmode=require",
        "postgresql://u:a?{}@host/db",
        "postgresql://u:a,'{}@host/db",
        "postgresql://host/db?user=u&password={}&sslmode=x",
        "postgresql://host/db?sslpassword={}",
        "https://user:{}@mlflow.example.com/path",
        "https://{}@mlflow.example.com/path",
        "http://h/?access_token={}&x=1",
        "http://h/a?X-Amz-Signature={}",
        "http://h/token/{}/x",
        "ray://u:{}@head:1",
        "u:{}@host:5432",
        "host=h user=u password={} dbname=x",
        "host=h password='{} x' dbname=x",
        '{{"password": "{}", "user": "u"}}',
        "{{'db_password': '{}'}}",
        "--set data.password={}",
        "--password {} x",
        "training.secret_key={}",
        "PGPASSWORD={} escala up",
        "Authorization: Bearer {}",
        "authorization: Token {}",
        "'Cookie': 'session={}'",
        "--token={} x",
        "http://h/#token={}",
        "http://h/#/experiments/3?x=1&access_token={}",
        "http://h/?pass={}",
        "http://h/a;pw={}",
        "http://h/?jwt={}",
        "http://h/?private_token={}",
        "http://h/?pass%77ord={}",
        "http://h/?x=a%26password%3D{}",
        "http://h/?next=http%3A%2F%2Fu%3A{}%40h2%2F",
        "http://h/?next=http://u:{}@h2/",
        "mssql+pyodbc://?odbc_connect=Driver%3Dx%3BPWD%3D{}",
        "//u:{}@host/db",
        "('http://h:80', 'https://user:{}@h2/x')",
    ],
)
def test_a_secret_is_hidden_by_its_form(text: str) -> None:
    hidden = hide(text.format(SECRET))
    assert SECRET not in hidden
    assert "***" in hidden
    assert hide(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "https://hooks.slack.com/services/T00/B00/abcdefghijklmnopqrstuv12",
        "https://h/550e8400-e29b-41d4-a716-446655440000/mlflow",
        "hf_ABCDEFGHIJKLMNOP123",
        "clone https://ghp_abcdefghijkl0123456@github.com/x/y",
    ],
)
def test_tokens_in_a_path_and_of_known_issuers_are_hidden(text: str) -> None:
    assert "***" in hide(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5099/#/experiments/1/runs/0123456789abcdef0123456789abcdef",
        "training.train_tokens=100000", "max_context_tokens: 256", "tokenizer: /tmp/x", "eos_token=</s>",
        "sqlite:////home/me/.escala/escala.db", "postgresql://u@host/db", "law@champion", "mine.rewards:score",
        "http://[::1]:80/x", "token_sha256: abc", "http://h:80/p@q:r", "spool:/home/a@b/c", "key=value",
        "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE", "see https://docs.example.com/a-long-page-name",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert hide(text) == text


def test_what_a_variable_holds_is_hidden_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "ESCALA_DATABASE_URL", "postgresql://escala:p%40ss%20word@db/escala?sslpassword=an-other"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tracker-pw")
    monkeypatch.setenv("MAX_TOKENS", "100000")
    text = hide("FATAL: 'p@ss word' or p%40ss%20word, an-other, tracker-pw; escala runs 100000 tokens")
    assert text == "FATAL: '***' or ***, ***, ***; escala runs 100000 tokens"
    monkeypatch.setenv("ESCALA_TRACKING_URI", "http://h/abcdefghijklmnopqrstuv12/x?a=1#token=in-fragment")
    said = "with url: /abcdefghijklmnopqrstuv12/api/2.0/x, in-fragment"
    assert hide(said) == "with url: /***/api/2.0/x, ***"
    monkeypatch.setenv("ESCALA_DATABASE_URL", "postgresql://escala:escala@db/escala")
    assert hide("escala logs") == "escala logs"


def test_plain_data_and_command_lines() -> None:
    data = {"token": SECRET, "list": [{"url": f"http://u:{SECRET}@h"}], "train_tokens": 5, "tokenizer": "x"}
    assert hide_in(data) == {
        "token": "***",
        "list": [{"url": "http://***@h"}],
        "train_tokens": 5,
        "tokenizer": "x",
    }
    words = (
        "escala",
        "--password",
        SECRET,
        "--set",
        f"x=http://u:{SECRET}@h",
        "--set",
        f"db.password={SECRET}",
    )
    assert SECRET not in str(hide_arguments(words))
    assert hide_arguments(("escala", "submit", "--set", "training.steps=3"))[3] == "training.steps=3"


def test_long_text_takes_no_longer_than_its_length() -> None:
    started = time.process_time()
    for text in (
        "a" * 200_000,
        "a.b-c_" * 30_000,
        "http://" + "a:b@" * 30_000,
        "http://h/" + "ab1/" * 30_000,
    ):
        hide(text)
    assert time.process_time() - started < 10


def test_errors_logs_and_tracebacks_hide(capsys: pytest.CaptureFixture[str]) -> None:
    error = EscalaError(f"cannot reach http://u:{SECRET}@h", f"check postgresql://u:{SECRET}@h")
    assert SECRET not in f"{error} {error.args}"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        redaction.hide_in_logs()
        try:
            raise ValueError(f"postgresql://u:{SECRET}@h/db")
        except ValueError as cause:
            try:
                raise RuntimeError("outer") from cause
            except RuntimeError as outer:
                logging.getLogger("escala.test").exception("failed at http://u:%s@h", SECRET)
                redaction.print_exception(outer)
    finally:
        root.removeHandler(handler)
        for each in root.handlers:
            if isinstance(each.formatter, redaction._Hiding):
                each.setFormatter(each.formatter._inner)
    shown = stream.getvalue() + capsys.readouterr().err
    assert "outer" in shown
    assert SECRET not in shown


def test_nothing_secret_goes_to_the_tracker_or_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        sent: list[Any] = []

        def log_batch(self, run_id: str, **batch: Any) -> None:
            self.sent += [item for items in batch.values() for item in items]

    tracker = MlflowTracker.__new__(MlflowTracker)
    tracker._client = Client()
    tracker.tags("run", {"escala.command": f"escala up --set x=http://u:{SECRET}@h"})
    tracker._params(
        "run", {"data.password": SECRET, "data.url": f"http://h?token={SECRET}", "training.steps": "3"}
    )
    sent = {item.key: item.value for item in Client.sent}
    assert SECRET not in str(sent)
    assert sent["training.steps"] == "3"
    with_password = job_variables("127.0.0.1:1", tracking_uri=f"http://u:{SECRET}@h", environ={})
    assert "MLFLOW_TRACKING_URI" not in with_password
    without = job_variables("127.0.0.1:1", tracking_uri="http://h:1", environ={})
    assert without["MLFLOW_TRACKING_URI"] == "http://h:1"


@pytest.mark.parametrize(
    "variables",
    [
        {"ESCALA_DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/x?sslpassword={SECRET}"},
        {"ESCALA_DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1port/x"},
        {"ESCALA_RAY_ADDRESS": f"ray://u:{SECRET}@head:10001"},
        {"ESCALA_RAY_ADDRESS": f"u:{SECRET}@head"},
    ],
)
def test_a_command_shows_no_password(variables: dict[str, str], tmp_path: Path) -> None:
    import os

    environment = {**os.environ, "ESCALA_HOME": str(tmp_path), **variables}
    command = [sys.executable, "-m", "escala.cli.main", "ps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert done.stderr.startswith("error:")
    assert SECRET not in done.stdout + done.stderr


def test_settings_show_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path, database_url=f"postgresql://u:{SECRET}@h/x", tracking_uri=f"http://u:{SECRET}@h"
    )
    assert SECRET not in f"{settings!r} {settings}"
    for name in ("ESCALA_RAY_PORT", "ESCALA_MLFLOW_PORT"):
        monkeypatch.setenv(name, "6399")
    with pytest.raises(SpecError) as caught:
        Settings(home=tmp_path, database_url=f"postgresql://u:{SECRET}@h/x")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["a b", "what?", "50%", "50%25", "c#", "ü", "?x=1#y %20"])
def test_a_home_of_any_name_holds_a_database(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    settings = Settings(home=home)
    store = JobStore(settings.database_url)
    job = store.submit(NewJob("pretrain", "workloads.pretrain", {"a": 1}))
    store.close()
    again = JobStore(Settings(home=home).database_url)
    assert again.get(job.id).config == {"a": 1}
    again.close()
    assert (home / "escala.db").is_file()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_address_that_is_none_is_not_shown() -> None:
    with pytest.raises(SpecError) as caught:
        open_engine(f"postgresql://u:{SECRET}@h:port/x")
    assert SECRET not in json.dumps([caught.value.message, caught.value.hint])

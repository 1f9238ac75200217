"""The CLI's surface is frozen (cli_surface.txt), and `--help` is cheap."""

import errno
import logging
import os
import resource
import sqlite3
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer

from escala.cli import main
from escala.cli.main import app
from escala.contract.errors import SpecError
from escala.jobs.records import NewJob
from escala.jobs.store import JobStore
from escala.settings import Settings

SURFACE = Path(__file__).with_name("cli_surface.txt")


def surface() -> list[str]:
    """Every command with its parameters, one a line."""
    lines = []

    def walk(command, path: str) -> None:
        parameters = [
            "/".join(p.opts) if p.param_type_name == "option" else f"<{p.name}>"
            for p in command.params
            if p.name != "help"
        ]
        lines.append(" ".join([path, *parameters]))
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(app), "escala")
    return lines


def test_surface_is_frozen() -> None:
    """A change of the surface is a deliberate diff: write the new lines into cli_surface.txt, and CHANGELOG."""
    assert surface() == SURFACE.read_text().splitlines()


def test_help_imports_nothing_heavy_and_is_cheap() -> None:
    code = (
        "import sys, runpy; sys.argv = ['escala', '--help']\n"
        "try: runpy.run_module('escala.cli.main', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'pandas', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    # The bound is on the work, not on the machine.
    assert _cpu_seconds(code) < 4 * _cpu_seconds("import typer, pydantic, rich.console")


def _cpu_seconds(code: str) -> float:
    """Of a Python process that runs `code`: the best of three."""
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(costs)


def test_a_mistake_exits_with_its_code_and_says_how_to_mend() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "escala.cli.main",
            "submit",
            "pretrain",
            "--dry-run",
            "--set",
            "model.n_layer=3",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown key model.n_layer" in done.stderr
    assert "did you mean n_layers?" in done.stderr


@pytest.fixture
def escala(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """Runs a command in this process: (exit code, stdout, stderr with what was logged)."""

    # as main leaves it, pytest would read it twice
    monkeypatch.setattr(logging.getLogger("escala"), "propagate", True)

    def run(home: Path, *words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("ESCALA_HOME", str(home))
        monkeypatch.setattr(sys, "argv", ["escala", *words])
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err + caplog.text

    return run


def test_the_version_is_the_packages(tmp_path: Path, escala) -> None:
    assert escala(tmp_path, "--version") == (0, f"escala {metadata.version('escala')}\n", "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("escala submit p", ["pretrain", "ppo"]),
        ("escala sweep c", ["chinchilla", "context"]),
        ("escala ro", ["rollouts"]),
    ],
)
def test_the_shell_completes_commands_workloads_and_spaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, escala, typed: str, offered: list[str]
) -> None:
    monkeypatch.setenv("_ESCALA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    assert escala(tmp_path)[:2] == (0, "\n".join(offered) + "\n")


def test_a_name_that_the_terminal_cannot_show_is_shown_in_part(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/escala.db")
    job = store.submit(
        NewJob("pretrain", "workloads.pretrain", {}, name="größer 模型 🙂", command=("x", "é→"))
    )
    store.close()
    given = os.environ | {"ESCALA_HOME": str(tmp_path), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "escala.cli.main", "jobs", "show", job.id]
    done = subprocess.run(words, env=given, capture_output=True, text=True)
    assert (done.returncode, "gr??er ?? ?" in done.stdout) == (0, True), done.stderr


def test_bad_rows_and_records_leave_the_commands_usable(tmp_path: Path, escala) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/escala.db")
    bad, good = (
        store.submit(NewJob("pretrain", "workloads.pretrain", {}, name=name)) for name in ("bad", "good")
    )
    store.close()
    with sqlite3.connect(tmp_path / "escala.db") as database:
        database.execute("UPDATE job SET config = 'no json' WHERE id = ?", (bad.id,))
    database.close()
    run = tmp_path / "run"
    run.mkdir()
    for name in ("ray", "mlflow", "runner", "watchdog"):
        (run / f"{name}.json").write_text('{"pid": ')
    code, out, err = escala(tmp_path, "ps")
    assert (code, good.id in out, bad.id in out) == (0, True, False)
    assert err.count(f"job {bad.id} is damaged in the job database and left out") == 1
    assert "the cluster is down" in err
    code, _, err = escala(tmp_path, "jobs", "show", bad.id)
    assert (code, "config is not JSON" in err) == (7, True)
    code, out, err = escala(tmp_path, "status")
    assert (code, out.count("absent"), err.count("is set aside")) == (0, 4, 4)
    assert escala(tmp_path, "down")[0] == 0


@pytest.mark.parametrize("kind", ["file", "file/below", "no database"])
def test_a_home_that_cannot_be_used_is_an_error_and_no_traceback(tmp_path: Path, escala, kind: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "no database").mkdir()
    (tmp_path / "no database" / "escala.db").write_text("not a database, " * 1000)
    code, _, err = escala(tmp_path / kind, "ps")
    assert (code, "error:" in err, "hint:" in err) == (5, True, True)


def test_without_a_home_directory_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ESCALA_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(SpecError, match="ESCALA_HOME"):
        Settings()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/x"),
    ],
)
def test_a_command_that_cannot_write_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 5
    assert "error:" in capsys.readouterr().err

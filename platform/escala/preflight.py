"""The checks of `workloads.preflight`, in a process of their own: a user's module that exits, crashes or never returns
ends that process, not the command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from escala.contract.errors import SpecError
from escala.runtime_env import source_paths
from escala.schema.data import corpora_of
from escala.schema.rewards import KINDS as REWARDS
from escala.storage import user_code

SECONDS = 30.0
TAIL_LINES = 3


def functions(config: Mapping[str, Any]) -> list[str]:
    """The user's functions that a configuration names: package.module:function."""
    rewards = [*(config.get("rewards") or []), *(config.get("reward") or [])]
    return [name for reward in rewards for name in REWARDS.read(reward).needs().functions]


def ready(
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    home: Path,
    code: str | Path | None = None,
    waits: bool = False,
    keep: bool = True,
) -> str | None:
    """Check a job, and copy the user's modules into the home; the copy's digest, None where it needs none.

    Args:
        inputs: what the configuration's files hold, by their dotted keys (`schema.workloads.Workload.inputs`).
        code: the directory of the user's modules; None: this one, where a function is in it.
        keep: False: leave no copy behind.

    Raises as `check` and `user_code.snapshot`.
    """
    source = _source(functions(config), code)
    if source is None and not functions(config) and not _reads_files(inputs, config):
        return None
    with tempfile.TemporaryDirectory(prefix="escala-code-") as elsewhere:
        place = home if keep else Path(elsewhere)
        digest = None if source is None else user_code.snapshot(source, place, _roots(functions(config)))
        check(inputs, config, None if digest is None else user_code.directory(place, digest), waits)
        return digest


def _source(names: list[str], code: str | Path | None) -> Path | None:
    if code is not None:
        return Path(code).expanduser().absolute()
    roots = _roots(names)
    if not roots:
        return None
    here = Path(os.getcwd())
    return here if any((here / root).is_dir() or (here / f"{root}.py").is_file() for root in roots) else None


def _roots(names: list[str]) -> set[str]:
    """The user's top-level modules that functions are in."""
    return {name.partition(":")[0].partition(".")[0] for name in names} - {*user_code.OURS}


def _reads_files(inputs: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    return bool(inputs or config.get("reward")) or any(corpus.needs() for corpus in corpora_of(config))


def check(
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    code: Path | None = None,
    waits: bool = False,
    seconds: float = SECONDS,
) -> None:
    """Raise SpecError for what the job could not do: see `workloads.preflight`.

    Args:
        inputs: as of `ready`.
        config: a checked configuration, as plain data.
        code: the directory of the user's modules.
        waits: the job starts after another one, which may write its files.
    """
    request = json.dumps({"inputs": dict(inputs), "config": config, "waits": waits})
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", user_code.VARIABLE)}
    if paths := source_paths():  # as a job's processes have it: not what this shell's PYTHONPATH adds
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if code is not None:
        environment[user_code.VARIABLE] = str(code)
    with tempfile.TemporaryDirectory(prefix="escala-check-") as directory:
        result, said = Path(directory, "problems.json"), Path(directory, "output")
        with said.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "workloads.preflight", str(result)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env=environment, cwd=directory, start_new_session=True,
            )  # fmt: skip
            try:
                child.communicate(request.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                raise _unsaid(config, f"took longer than {seconds:g} s", said) from None
            finally:
                if child.poll() is None or functions(config):  # what a user's module has started goes, too
                    _end(child)
        if not result.is_file():
            exit_code = child.returncode
            how = (
                f"by signal {signal.Signals(-exit_code).name}"
                if exit_code < 0
                else f"with exit code {exit_code}"
            )
            raise _unsaid(config, f"ended {how}", said)
        problems = json.loads(result.read_text())
    if problems:
        messages, hints = zip(*problems, strict=True)
        raise SpecError(" ".join(dict.fromkeys(messages)), " ".join(dict.fromkeys(h for h in hints if h)))


def _unsaid(config: Mapping[str, Any], how: str, said: Path) -> SpecError:
    lines = said.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    words = f": {' / '.join(lines)}" if lines else ""
    names = ", ".join(functions(config))
    what = f"importing {names}" if names else "checking the job's files"
    return SpecError(
        f"{what} {how}{words}", "let the module do nothing but define functions when it is imported"
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing of it is left
        return
    child.wait()

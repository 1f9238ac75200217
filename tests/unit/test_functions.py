"""A user's reward functions: their own process, what ends it, the copy of their modules, and what is checked first."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from escala import preflight
from escala.contract.errors import EscalaError, SpecError, StateError
from escala.schema.workloads import WORKLOADS
from escala.storage import user_code
from workloads.preflight import problems
from workloads.rewards import user_functions
from workloads.rewards.user_functions import UserFunction

INPUTS = WORKLOADS["ppo"].inputs
MODULE = """
import os, re, sys, time
calls = 0
def score(prompts, responses): return [len(r) for r in responses]
def counted(prompts, responses):
    global calls
    calls += 1
    return [calls for _ in responses]
def exits(prompts, responses): sys.exit(3)
def leaves(prompts, responses): os._exit(0)
def interrupts(prompts, responses): raise KeyboardInterrupt
def sleeps(prompts, responses): time.sleep(1000)
def backtracks(prompts, responses): return [bool(re.match("(a+)+$", "a" * 60 + "b")) for _ in responses]
def crashes(prompts, responses): os.kill(os.getpid(), 11)
def one(prompts): return prompts
def three(prompts, responses, rubric): return prompts
async def waits(prompts, responses): return [1.0]
class Waiting:
    async def __call__(self, prompts, responses): return [1.0]
waiting = Waiting()
async def streams(prompts, responses): yield 1.0
def yields(prompts, responses): yield from (1.0 for _ in responses)
def none(prompts, responses): return None
def huge(prompts, responses): return [10**400 for _ in responses]
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "code" / "mine"
    package.mkdir(parents=True)
    (package / "rewards.py").write_text(MODULE)
    (package / "exits.py").write_text("import sys; sys.exit(7)")
    (package / "loops.py").write_text("while True: pass")
    (package / "crashes.py").write_text(
        "import os; print('last words', flush=True); os.kill(os.getpid(), 11)"
    )
    (package / "words.txt").write_text("good")
    monkeypatch.setenv(user_functions.CODE, str(package.parent))
    return package.parent


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("exits", SpecError, "raised SystemExit: 3"),
        ("leaves", SpecError, "ended its process with exit code 0"),
        ("interrupts", SpecError, "raised KeyboardInterrupt"),
        ("sleeps", StateError, "did not return within 0.5 s"),
        ("backtracks", StateError, "did not return within 0.5 s"),
        ("crashes", SpecError, "ended its process by signal SIGSEGV"),
        ("one", SpecError, "can't be called as function(prompts, responses)"),
        ("three", SpecError, "can't be called as function(prompts, responses)"),
        ("waits", SpecError, "is a coroutine"),
        ("none", SpecError, "raised TypeError"),
        ("huge", SpecError, "for response 1"),
        ("absent", SpecError, "is not there"),
        ("waiting", SpecError, "is a coroutine"),
        ("streams", SpecError, "is a coroutine"),
    ],
)
def test_a_function_s_end_is_its_own_error(code: Path, name: str, kind: type[EscalaError], says: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        UserFunction(f"mine.rewards:{name}", 0.5)(["p"], ["r"])
    assert f"mine.rewards:{name}" in caught.value.message
    assert says in caught.value.message
    assert time.monotonic() - started < 60


def test_a_function_keeps_its_process_and_gets_another_after_a_crash(code: Path) -> None:
    counted = UserFunction("mine.rewards:counted")
    assert [counted(["p"], ["r"]), counted(["p"], ["r"])] == [[1.0], [2.0]]
    os.killpg(counted._process._child.pid, 9)
    counted._process._child.wait(60)
    assert counted(["p"], ["r"]) == [1.0]
    counted.close()
    assert counted._process._child.returncode is not None
    long = UserFunction("mine.rewards:score")(["p" * 100] * 3000, ["r" * 1000] * 3000)
    assert sum(long) == 3_000_000


@pytest.mark.parametrize("name", ["json", "torch", "escala"])
def test_a_user_s_module_hides_no_other_and_is_told_so(code: Path, name: str) -> None:
    (code / f"{name}.py").write_text("def score(prompts, responses): return [0.0 for _ in responses]\n")
    assert UserFunction("mine.rewards:score")(["p"], ["rr"]) == [2.0]  # which imports json and escala
    if name != "torch":  # it takes long to import
        with pytest.raises(SpecError, match=f"Rename your {name}"):
            UserFunction(f"{name}:score")


def test_a_snapshot_is_the_modules_by_content(code: Path, tmp_path: Path) -> None:
    for path in (
        ".git/x.py",
        "venv/pyvenv.cfg",
        "venv/x.py",
        "data/large.bin",
        "mine/__pycache__/x.pyc",
        "escala/x.py",
    ):
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        (code / path).write_text("x")
    (code / "mine" / ".venv").mkdir()
    (code / "mine" / ".venv" / "pyvenv.cfg").write_text("")
    (code / "helper.py").write_text("")
    found = {
        "helper.py",
        *(f"mine/{n}" for n in ("crashes.py", "exits.py", "loops.py", "rewards.py", "words.txt")),
    }
    (code / "data" / "scripts").mkdir()
    (code / "data" / "scripts" / "x.py").write_text("")
    assert set(user_code.modules(code)) == found
    assert set(user_code.modules(code, ["data"])) == found | {"data/large.bin", "data/scripts/x.py"}
    digest = user_code.snapshot(code, tmp_path / "home")
    copy = user_code.directory(tmp_path / "home", digest)
    assert (copy / "mine" / "words.txt").read_text() == "good"
    assert user_code.snapshot(code, tmp_path / "home") == digest
    (code / "mine" / "words.txt").write_text("better")
    assert user_code.snapshot(code, tmp_path / "home") != digest
    assert (copy / "mine" / "words.txt").read_text() == "good"
    assert not [p for p in (tmp_path / "home" / "code").iterdir() if p.name.startswith(".")]
    with pytest.raises(SpecError, match="--code"):
        user_code.snapshot(tmp_path / "nothing", tmp_path / "home")


def test_a_directory_of_more_than_code_is_refused(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_code, "MOST_FILES", 3)
    with pytest.raises(SpecError, match="more than 3 files"):
        user_code.snapshot(code, tmp_path / "home")


def ppo(directory: Path, **changes: Any) -> dict[str, Any]:
    (directory / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    rewards = [{"kind": "function", "function": "mine.rewards:score", "weight": 1.0}]
    return {"prompts": str(directory / "prompts.jsonl"), "rewards": rewards, **changes}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("mine.exits:f", "SystemExit: 7"),
        ("mine.crashes:f", "ended by signal SIGSEGV: last words"),
        ("mine.loops:f", "took longer than 2 s"),
        ("mine.rewards:one", "can't be called as function"),
        ("nowhere.at_all:f", "No module named 'nowhere'"),
    ],
)
def test_a_module_takes_no_command_down(code: Path, tmp_path: Path, function: str, says: str) -> None:
    config = ppo(tmp_path, rewards=[{"kind": "function", "function": function}])
    with pytest.raises(SpecError) as caught:
        preflight.check(INPUTS, config, code, seconds=2 if "loops" in function else 60)
    assert function in caught.value.message
    assert says in caught.value.message


def test_functions_of_the_present_directory_are_found_and_copied(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(user_functions.CODE)
    monkeypatch.chdir(code)
    home = tmp_path / "home"
    digest = preflight.ready(INPUTS, ppo(tmp_path), home)
    assert digest is not None
    assert (user_code.directory(home, digest) / "mine" / "rewards.py").is_file()
    assert preflight.ready(INPUTS, ppo(tmp_path), tmp_path / "other", keep=False) == digest
    assert not (tmp_path / "other").exists()
    (code / "spread" / "inner").mkdir(parents=True)  # Python in a subfolder alone, and no __init__.py
    (code / "spread" / "inner" / "r.py").write_text("def score(prompts, responses): return []")
    spread = ppo(tmp_path, rewards=[{"kind": "function", "function": "spread.inner.r:score"}])
    assert preflight.ready(INPUTS, spread, home) not in (None, digest)
    shutil.rmtree(code / "spread")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="No module named 'mine'"):
        preflight.ready(INPUTS, ppo(tmp_path), home)
    assert preflight.ready(INPUTS, ppo(tmp_path), home, code=code) == digest
    assert preflight.ready({}, {"data": {"corpora": [{"kind": "python_source"}]}}, home) is None


@pytest.mark.parametrize(
    ("workload", "key", "text", "says"),
    [
        ("ppo", "prompts", None, "No such file"),
        ("ppo", "prompts", "", "is empty"),
        ("ppo", "prompts", "\n\n", "is empty"),
        ("ppo", "prompts", "{no json\n", "line 1 is not JSON"),
        ("ppo", "prompts", '{"prompt": "a"}\n{"question": "b"}\n', "line 2"),
        ("sft", "train", '{"prompt": "a"}\n', "line 1"),
        ("dpo", "train", '{"prompt": "a", "chosen": "b"}\n', "line 1"),
        ("judge", "responses", "", "is empty"),
    ],
)
def test_files_are_looked_into_before_a_job_is_queued(
    tmp_path: Path, workload: str, key: str, text: str | None, says: str
) -> None:
    path = tmp_path / "lines.jsonl"
    if text is not None:
        path.write_text(text)
    config: dict[str, Any] = {key: str(path), "rewards": []}
    if workload in ("sft", "dpo"):
        config = {"data": {key: str(path), "held_out": None}}
    if workload == "judge":
        config = {"responses": str(path), "judge": {"model": str(tmp_path)}}
    [(message, _)] = problems(WORKLOADS[workload].inputs, config, waits=False)
    assert str(path) in message
    assert says in message
    if text is None:
        assert not problems(
            WORKLOADS[workload].inputs, config, waits=True
        )  # the job before it may write the file


def test_a_critic_reads_the_actor_s_tokens(tmp_path: Path) -> None:
    from workloads.data.tokenizer import train_tokenizer

    for name, text in (("actor", "abc abd"), ("same", "abc abd"), ("other", "xyz xyw zzz")):
        (tmp_path / name).mkdir()
        train_tokenizer([text * 50], 270).save(str(tmp_path / name / "tokenizer.json"))

    def config(critic: str) -> dict[str, Any]:
        start = {"start": {"path": str(tmp_path / critic)}}
        return ppo(tmp_path, start={"path": str(tmp_path / "actor")}, critic=start, rewards=[])

    assert not problems(INPUTS, config("same"), waits=False)
    [(message, _)] = problems(INPUTS, config("other"), waits=False)
    assert "another tokenizer than the actor" in message


def said(workload: str, config: dict[str, Any]) -> str:
    return problems(WORKLOADS[workload].inputs, config, waits=False)[0][0]


def test_pipes_and_directories_are_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        assert "no regular file" in said("ppo", {"prompts": str(path), "rewards": []})
    corpora = [{"kind": "files", "root": str(tmp_path), "globs": ["*.txt"]}]
    assert "No file with text" in said("pretrain", {"data": {"corpora": corpora}})
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x"}))
    corpora = [{"kind": "jsonl", "path": str(tmp_path / "a.jsonl"), "text_key": "text"}]
    assert "`text`" in said("pretrain", {"data": {"corpora": corpora}})

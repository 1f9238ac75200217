"""README's commands, as a newcomer types them in a home of their own, and the outputs shown beside them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
pytestmark = [pytest.mark.docs, pytest.mark.timeout(900)]
Shell = Callable[[str], str]


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section; language "" for outputs."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"README has no section {title}"
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", found[1], re.DOTALL | re.MULTILINE)
    return [text for kind, text in fences if kind == language]


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, or empty lines around."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Iterator[Shell]:
    """A shell in an empty directory, in a home whose cluster is taken down afterwards."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "one.md").write_text("All models are wrong, and some are useful.\n" * 20)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(tmp_path)}

    def shell(script: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return tidy(done.stdout)

    yield shell
    shell("escala down")


def test_a_law_from_a_table_answers_as_shown(run: Shell) -> None:
    fit, ask, limits = blocks("Ask a law", "bash")
    law, answers = (tidy(text) for text in blocks("Ask a law", ""))
    assert law in run(fit)
    assert answers == "\n\n".join(run(line) for line in ask.splitlines())
    assert all("binding" in text or "compute" in text for text in map(run, limits.splitlines()))
    propose, _ = blocks("The next run", "bash")[0].splitlines()
    assert run(propose).count("FLOP ") == 3
    assert "GB a device" in run(blocks("What it costs", "bash")[0])


def test_a_sweep_becomes_a_law(run: Shell) -> None:
    said = run(blocks("Sweep", "bash")[0])
    assert "trials    14" in said
    assert "points    14" in said
    assert "stored as tiny@1" in said
    explore = blocks("The next run", "bash")[0].splitlines()[1]
    assert "width expected" in run(explore)
    mine = blocks("Sweep", "yaml")[0]
    assert "trials" in run(f"cat > mine.yaml <<'END'\n{mine}END\nescala sweep mine.yaml --dry-run")


def test_a_job_is_planned_from_keys_a_file_or_one_dial(run: Shell) -> None:
    keys, file = blocks("Submit a job", "bash")[0].splitlines()
    spec = blocks("Submit a job", "yaml")[0]
    assert keys.endswith("--dry-run")
    assert file.endswith("--follow")  # not here: it trains for minutes
    planned = (
        run(keys),
        run(f"cat > spec.yaml <<'END'\n{spec}END\n{file.removesuffix('--follow')} --dry-run"),
        run("escala submit pretrain --compute-flops 1e13 --dry-run"),
    )
    assert all("FLOPs" in text for text in planned)


def test_a_model_starts_from_a_job(run: Shell, tmp_path: Path) -> None:
    install, ratings, reward, export = blocks("Start from a model", "bash")[0].splitlines()
    assert "vaderSentiment" in install  # make setup has done it
    run(ratings)
    small = "model={n_layers: 2, d_model: 64, n_heads: 2, vocab_size: 512, max_context_tokens: 64}"
    data = "data={tokenizer: {vocab_size: 512}, max_characters: 2000000}"
    run(
        f"escala submit pretrain --name first --set '{small}' --set '{data}' --set training.steps=30 --follow"
    )
    run(f"{reward} --set training.steps=20 --follow")
    run(export)
    assert (tmp_path / "first-hf" / "model.safetensors").exists()
    line = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
    (tmp_path / "chats.jsonl").write_text(line * 2)
    spec = re.sub(r"path: \S+}", "path: first-hf}", blocks("Start from a model", "yaml")[0]).replace(
        "192", "64"
    )
    planned = run(f"cat > sft.yaml <<'END'\n{spec}END\nescala submit sft sft.yaml --dry-run")
    assert "d_model: 64" in planned  # read from what was exported

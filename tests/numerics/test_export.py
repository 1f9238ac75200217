"""`escala export`: what transformers opens gives the checkpoint's own logits and token ids."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from escala import api, manifests
from escala.errors import CheckpointError, DataError, NotFoundError, SpecError
from escala.jobs.export import _explained
from escala.records import JobFiles
from workloads.config import DataConfig, ModelConfig
from workloads.data.prepared import PreparedData
from workloads.data.shards import prepare
from workloads.data.tokenizer import load_tokenizer
from workloads.export import main
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer

RUN = "0123456789abcdef"
TEXT = "In the beginning there was a word, and the word was followed by another word. "


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """HOME/data of a run on a few sentences, with a tokenizer trained on them."""
    home = tmp_path_factory.mktemp("home")
    texts = home / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(TEXT * 3 + str(number) * 30)
    config = DataConfig.model_validate(
        {
            "corpora": [{"kind": "files", "root": str(texts)}],
            "tokenizer": {"vocab_size": 300},
            "held_out_fraction": 0.3,
        }
    )
    return prepare(config, home / "data", 16)


@pytest.fixture
def home(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = prepared.path.parents[2]
    monkeypatch.setenv("ESCALA_HOME", str(home))
    return home


def write_checkpoint(files: JobFiles, model: Transformer, tokenizer: str, step: int) -> Path:
    """A checkpoint as `workloads.training.checkpoint` lays it out, over two ranks' files."""
    path = files.checkpoints / manifests.checkpoint_name(step)
    path.mkdir(parents=True)
    tensors = {f"master/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"exp_avg/{name}": torch.zeros_like(value) for name, value in model.state_dict().items()}
    facts = {}
    for rank in range(2):
        file = path / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(dict(sorted(tensors.items())[rank::2]), file)
        facts[file.name] = {"sha256": manifests.file_sha256(file), "bytes": file.stat().st_size}
    manifest = {
        "format_version": manifests.FORMAT_VERSION,
        "step": step,
        "config": {"model": model.config.model_dump(mode="json")},
        "fingerprints": {"tokenizer": tokenizer},
        "files": facts,
    }
    (path / manifests.MANIFEST).write_text(json.dumps(manifest))
    run_id = files.attempt(1).spool / "run_id"
    run_id.parent.mkdir(parents=True, exist_ok=True)
    run_id.write_text(RUN + "\n")
    return path


def tiny(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=vocab_size, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2))


@pytest.mark.slow
def test_an_exported_run_opens_in_transformers(prepared: PreparedData, home: Path, tmp_path: Path) -> None:
    model = tiny(prepared.vocab_size)
    files = JobFiles(home, "job-a")
    write_checkpoint(files, tiny(prepared.vocab_size + 1), prepared.tokenizer_fingerprint, 5)
    write_checkpoint(files, model, prepared.tokenizer_fingerprint, 10)
    newest = write_checkpoint(files, tiny(prepared.vocab_size + 2), prepared.tokenizer_fingerprint, 15)
    (newest / "rank-00000-of-00002.safetensors").write_bytes(
        b"damaged"
    )  # the newest good one is that of step 10

    path = api.export(RUN[:6], tmp_path / "out")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    own = load_tokenizer(prepared.tokenizer_path)
    text = TEXT + "Où?"
    assert tokenizer(text)["input_ids"] == own.encode([text])[0].tolist()
    assert load_tokenizer(path / "tokenizer.json").fingerprint == prepared.tokenizer_fingerprint
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == prepared.end_of_text
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing is left half written
    with pytest.raises(SpecError, match="not an empty directory"):
        api.export(RUN, path)


def test_what_the_exporting_process_refuses_is_told(
    prepared: PreparedData, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(JobFiles(home, "job-b"), tiny(prepared.vocab_size), "f" * 64, 5)
    code = main([str(path), "--to", str(tmp_path / "out"), "--data", str(home / "data")])
    error = _explained(subprocess.CompletedProcess([], code, capsys.readouterr().out, "a warning"))
    assert isinstance(error, DataError)
    assert "the tokenizer ffffffffffff that the checkpoint was trained with" in error.message
    assert "ESCALA_HOME" in error.hint
    assert not any(tmp_path.iterdir())
    crashed = _explained(subprocess.CompletedProcess(["python"], 1, "", "Traceback\nMemoryError"))
    assert crashed.message == "the export ended with exit code 1: MemoryError"


def test_a_model_that_hugging_face_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny(64)
    model.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="no place for the weight bias"):
        save_pretrained(model, tmp_path)


def test_names_without_a_checkpoint(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no run and no job 'nothing'"):
        api.export("nothing", tmp_path / "out")
    for job in ("job-c", "job-d"):
        run_id = JobFiles(home, job).attempt(1).spool / "run_id"
        run_id.parent.mkdir(parents=True)
        run_id.write_text(f"ca-{job}")
    with pytest.raises(NotFoundError, match="2 jobs begin with"):
        api.export("ca", tmp_path / "out")
    with pytest.raises(NotFoundError, match="no good checkpoint"):
        api.export("ca-job-c", tmp_path / "out")

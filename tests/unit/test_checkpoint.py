"""The part of checkpoints that needs no torch: names, manifests, hashes, retention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from escala import manifests
from escala.errors import CheckpointError
from escala.manifests import check_fits, latest, list_checkpoints, read_checkpoint, to_delete, verify


def make(directory: Path, step: int, content: bytes = b"weights", **extra: object) -> Path:
    path = directory / manifests.checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "rank-0.safetensors").write_bytes(content)
    facts = {
        "sha256": manifests.file_sha256(path / "rank-0.safetensors"),
        "bytes": len(content),
    }
    manifest = {"format_version": 2, "step": step, "files": {"rank-0.safetensors": facts}, **extra}
    (path / manifests.MANIFEST).write_text(json.dumps(manifest))
    return path


def test_the_newest_is_used(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 10)
    found, refused = latest(tmp_path)
    assert found is not None
    assert (found.step, found.size_bytes, refused) == (10, 7, [])
    assert [c.step for c in list_checkpoints(tmp_path)] == [5, 10]


def test_no_directory_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") == (None, [])


def corrupt(path: Path) -> None:
    (path / "rank-0.safetensors").write_bytes(b"weightz")


def shorten(path: Path) -> None:
    (path / "rank-0.safetensors").write_bytes(b"wei")


def lose(path: Path) -> None:
    (path / "rank-0.safetensors").unlink()


def no_manifest(path: Path) -> None:
    (path / manifests.MANIFEST).unlink()


def half_manifest(path: Path) -> None:
    text = (path / manifests.MANIFEST).read_text()
    (path / manifests.MANIFEST).write_text(text[: len(text) // 2])


def foreign_manifest(path: Path) -> None:
    (path / manifests.MANIFEST).write_text('{"format_version": 2, "step": 7, "files": {}}')


def partial(path: Path) -> None:
    path.rename(path.with_name(path.name + manifests.PARTIAL))


@pytest.mark.parametrize(
    "damage", [corrupt, shorten, lose, no_manifest, half_manifest, foreign_manifest, partial]
)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, damage) -> None:
    make(tmp_path, 5)
    damage(make(tmp_path, 10))
    found, refused = latest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(refused) == 1
    assert "step-00000010" in str(refused[0])


def test_verify_names_the_file(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    corrupt(path)
    with pytest.raises(CheckpointError, match=r"hash of rank-0\.safetensors"):
        verify(read_checkpoint(path))


def test_another_format_is_refused_with_its_number(tmp_path: Path) -> None:
    path = make(tmp_path, 5, format_version=99)
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(path)


NAMES = ["step-00000005", "step-00000010", "step-00000015"]


@pytest.mark.parametrize(
    ("names", "keep", "expected"),
    [
        (NAMES, 2, ["step-00000005"]),
        (NAMES, 1, ["step-00000005", "step-00000010"]),
        (NAMES, 3, []),
        (NAMES, 9, []),
        ([], 1, []),
        ([*NAMES, "notes", "step-x", ".step-00000001.tmp"], 3, []),  # not ours: never touched
        ([*NAMES, "step-00000010.partial"], 3, ["step-00000010.partial"]),  # stale
        ([*NAMES, "step-00000020.partial"], 3, []),  # perhaps being written
        (["step-99999999", "step-100000000"], 1, ["step-99999999"]),  # by number, not by letter
    ],
)
def test_retention(names: list[str], keep: int, expected: list[str]) -> None:
    assert to_delete(names, keep) == expected


def test_another_model_or_tokenizer_is_refused_naming_the_keys(tmp_path: Path) -> None:
    stored = {"config": {"model": {"d_model": 8, "n_layers": 2}}, "fingerprints": {"tokenizer": "aaa"}}
    checkpoint = read_checkpoint(make(tmp_path, 5, **stored))
    check_fits(checkpoint, {"d_model": 8, "n_layers": 2}, "aaa")
    with pytest.raises(CheckpointError, match="n_layers: 2 there, 3 here") as caught:
        check_fits(checkpoint, {"d_model": 8, "n_layers": 3}, "aaa")
    assert "d_model" not in caught.value.message
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_fits(checkpoint, {"d_model": 8, "n_layers": 2}, "bbb")


def test_how_experts_lie_on_workers_is_not_the_model_s(tmp_path: Path) -> None:
    model = {"d_model": 8, "moe": {"experts": 4, "expert_parallel": True}}
    stored = {"config": {"model": model}, "fingerprints": {"tokenizer": "aaa"}}
    checkpoint = read_checkpoint(make(tmp_path, 5, **stored))
    check_fits(checkpoint, {**model, "moe": {"experts": 4, "expert_parallel": False}}, "aaa")
    with pytest.raises(CheckpointError, match="another model"):
        check_fits(checkpoint, {**model, "moe": {"experts": 8, "expert_parallel": True}}, "aaa")
    with pytest.raises(CheckpointError, match="another model"):
        check_fits(checkpoint, {**model, "moe": None}, "aaa")


def test_the_control_plane_reads_checkpoints_without_torch() -> None:
    code = "import sys, escala.manifests; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

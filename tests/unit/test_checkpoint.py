"""The part of checkpoints that needs no torch: names, manifests, hashes, retention."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from escala.contract import checkpoints
from escala.contract.checkpoints import to_delete
from escala.contract.errors import CheckpointError
from escala.contract.sealed import SEAL, seal
from escala.storage.checkpoints import (
    Retention,
    check_fits,
    check_readable,
    checkpoint_at,
    latest,
    list_checkpoints,
    newest,
    open_checkpoints,
    retention,
    verify,
    verify_tokenizer,
)


def make(directory: Path, step: int, content: bytes = b"weights", **extra: object) -> Path:
    path = directory / checkpoints.checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "rank-0.safetensors").write_bytes(content)
    files = {"rank-0.safetensors": checkpoints.file_entry(path / "rank-0.safetensors")}
    write(path, {"format_version": checkpoints.FORMAT_VERSION, "step": step, "files": files, **extra})
    return path


def write(path: Path, manifest: dict) -> None:
    """A manifest with its right hash, whatever it says."""
    (path / checkpoints.MANIFEST).write_text(json.dumps(seal(manifest), indent=1, sort_keys=True))


def content_of(path: Path) -> dict:
    return json.loads((path / checkpoints.MANIFEST).read_text())


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_newest_is_used(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 10)
    found, refused = latest(open_checkpoints(tmp_path))
    assert found is not None
    assert (found.step, found.size_bytes, refused) == (10, 7, [])
    assert [c.step for c in list_checkpoints(open_checkpoints(tmp_path))] == [5, 10]


def test_no_directory_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest(open_checkpoints(tmp_path / "missing")) == (None, [])


def corrupt(path: Path) -> None:
    (path / "rank-0.safetensors").write_bytes(b"weightz")


def shorten(path: Path) -> None:
    (path / "rank-0.safetensors").write_bytes(b"wei")


def lose(path: Path) -> None:
    (path / "rank-0.safetensors").unlink()


def no_manifest(path: Path) -> None:
    (path / checkpoints.MANIFEST).unlink()


def half_manifest(path: Path) -> None:
    text = (path / checkpoints.MANIFEST).read_text()
    (path / checkpoints.MANIFEST).write_text(text[: len(text) // 2])


def foreign_manifest(path: Path) -> None:
    write(path, content_of(path) | {"step": 7})


def another_format(path: Path) -> None:
    (path / checkpoints.MANIFEST).write_text(json.dumps(content_of(path) | {"format_version": 2}))


def unsealed(path: Path) -> None:
    content = content_of(path)
    del content[SEAL]
    (path / checkpoints.MANIFEST).write_text(json.dumps(content))


def changed_after_it_was_sealed(path: Path) -> None:
    (path / checkpoints.MANIFEST).write_text(json.dumps(content_of(path) | {"adam_step": 11}))


def manifest_text(text: str | bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / checkpoints.MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def manifest_key(key: str, value: object) -> Callable[[Path], None]:
    """Another value (or no key) under a right hash: what another writer, or somebody who can hash, may leave."""

    def damage(path: Path) -> None:
        content = {k: v for k, v in content_of(path).items() if k != key}
        write(path, content if value is None else content | {key: value})

    return damage


def file_named(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path.parent / "secret").write_bytes(b"weights")
        entry = checkpoints.file_entry(path / "rank-0.safetensors")
        write(path, content_of(path) | {"files": {name: entry}})

    return damage


def key_twice(path: Path) -> None:
    text = (path / checkpoints.MANIFEST).read_text()
    (path / checkpoints.MANIFEST).write_text(text.replace('"step"', '"step": 10, "step"'))


def replaced(what: str, name: str) -> Callable[[Path], None]:
    """A file that is a link, a directory or a pipe now."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).unlink()
        if what == "link":
            (path.parent / "elsewhere").write_bytes(content)
            (path / name).symlink_to(path.parent / "elsewhere")
        elif what == "directory":
            (path / name).mkdir()
        else:
            os.mkfifo(path / name)

    return damage


def no_directory(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"a file")


ENTRY = {"sha256": "0" * 64, "bytes": 7}
WEIGHTS = "rank-0.safetensors"


def partial(path: Path) -> None:
    path.rename(path.with_name(path.name + checkpoints.PARTIAL))


@pytest.mark.parametrize(
    "damage",
    [corrupt, shorten, lose, no_manifest, half_manifest, foreign_manifest, partial, another_format, unsealed]
    + [changed_after_it_was_sealed, key_twice, no_directory]
    + [manifest_text(t) for t in ("", "[]", "null", "7", "not JSON", b"\xff\xfe{}", b"\x00" * 99)]
    + [manifest_text("[" * 200_000), manifest_text('{"a":' * 200_000), manifest_text("9" * 9_000)]
    + [manifest_key("files", value) for value in (None, {}, [], "x", 7, {WEIGHTS: None}, {WEIGHTS: {}})]
    + [manifest_key("files", {WEIGHTS: ENTRY | {"bytes": value}}) for value in (-1, True, "7", 7.0, None, [])]
    + [manifest_key("files", {WEIGHTS: ENTRY | {"sha256": value}}) for value in (None, 7, "0" * 63, "Z" * 64)]
    + [manifest_key("step", value) for value in (None, "10", True, 10.5, [10])]
    + [manifest_key("format_version", value) for value in (None, "3", True, [3], 1, 99)]
    + [file_named(name) for name in ("", ".", "..", "../secret", "/etc/passwd", "a/b", "a\x00b", "\ud800")]
    + [file_named(name) for name in (".hidden", "manifest.json", "x" * 256, "a b", "é", "a\nb", "..\\secret")]
    + [replaced(what, name) for what in ("link", "directory", "pipe") for name in (WEIGHTS, "manifest.json")],
)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, damage) -> None:
    make(tmp_path, 5)
    damage(make(tmp_path, 10))
    found, refused = latest(open_checkpoints(tmp_path))
    assert found is not None
    assert found.step == 5
    assert len(refused) == 1
    assert "step-00000010" in str(refused[0])


def test_verify_names_the_file(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    corrupt(path)
    with pytest.raises(CheckpointError, match=r"hash of rank-0\.safetensors"):
        verify(checkpoint_at(path))


def test_another_format_is_refused_with_its_number(tmp_path: Path) -> None:
    path = make(tmp_path, 5, format_version=2, versions={"escala": "0.1.7"})
    with pytest.raises(CheckpointError, match="format 2; this version reads 3") as caught:
        checkpoint_at(path)
    assert "use the version of escala that wrote it (0.1.7), or move the directory away" in caught.value.hint


@pytest.mark.parametrize("indent", [1, None])
def test_a_flipped_bit_of_a_manifest_is_refused_or_says_the_same(tmp_path: Path, indent: int | None) -> None:
    stored = {
        "config": {"model": {"d_model": 8, "rate": 1e-5, "on": True}},
        "counters": {"loss": 5.5, "x": None},
    }
    path = make(tmp_path, 5, fingerprints={"tokenizer": "é" * 9}, **stored)
    manifest = path / checkpoints.MANIFEST
    before = content_of(path)
    content = json.dumps(before, indent=indent).encode()
    harmless = 0
    for bit in random.Random(14).sample(range(8 * len(content)), 300):
        manifest.write_bytes(flipped(content, bit))
        try:
            found = checkpoint_at(path)
        except CheckpointError:
            continue
        assert found.manifest == before
        harmless += 1
    assert harmless < 5  # 1e-05 as 1E-05 or the like


def test_a_flipped_bit_of_a_file_is_refused(tmp_path: Path) -> None:
    content = bytes(range(256)) * 16
    path = make(tmp_path, 5, content)
    for bit in random.Random(14).sample(range(8 * len(content)), 100):
        (path / WEIGHTS).write_bytes(flipped(content, bit))
        with pytest.raises(CheckpointError, match=r"hash of rank-0\.safetensors differs"):
            verify(checkpoint_at(path))


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


def retained(directory: Path, keep: int) -> list[str]:
    for name in retention(open_checkpoints(directory), keep).delete:
        shutil.rmtree(directory / name)
    return sorted(path.name for path in directory.iterdir())


def test_refused_checkpoints_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    for step, damage in ((650, another_format), (700, corrupt), (800, no_manifest)):
        damage(make(tmp_path, step))
    make(tmp_path, 10)
    names = ["step-00000010", "step-00000650", "step-00000700", "step-00000800"]
    assert retained(tmp_path, 2) == names
    make(tmp_path, 20)
    assert retained(tmp_path, 2) == ["step-00000010", "step-00000020", *names[1:]]
    make(tmp_path, 30)  # now there are three good ones, the damaged ones stay
    assert retained(tmp_path, 2) == ["step-00000020", "step-00000030", *names[1:]]
    found = [error.message for error in retention(open_checkpoints(tmp_path), 2).damaged]
    assert len(found) == 3
    assert all(name in " ".join(found) for name in names[1:])
    newest, refused = latest(open_checkpoints(tmp_path))
    assert newest is not None
    assert (newest.step, len(refused)) == (30, 3)


@pytest.mark.parametrize("damage", [corrupt, shorten, lose, another_format, unsealed])
def test_a_damaged_one_is_never_what_is_kept_or_deleted(tmp_path: Path, damage) -> None:
    for step in (5, 10, 15):
        make(tmp_path, step)
    assert len(retention(open_checkpoints(tmp_path), 2).delete) == 1  # they are known to be good from here on
    damage(tmp_path / "step-00000015")
    assert retained(tmp_path, 2) == ["step-00000005", "step-00000010", "step-00000015"]
    assert retained(tmp_path, 1) == ["step-00000010", "step-00000015"]


def test_what_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    outside = make(tmp_path / "elsewhere", 1)
    directory = tmp_path / "checkpoints"
    make(directory, 5), make(directory, 6)
    (directory / "step-00000001").symlink_to(outside)
    (directory / "step-000000002").mkdir()  # 2, but not as we write it
    (directory / "step-00000003.damaged-0123abcd").mkdir()
    (directory / "step-\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668").mkdir()
    found = retention(open_checkpoints(directory), 1)
    assert found.delete == ["step-00000005"]
    assert len(found.damaged) == 2
    assert list_checkpoints(open_checkpoints(directory))[0].step == 1  # to read from a link is fine


def test_a_job_whose_checkpoints_are_all_refused_does_not_start_again_silently(tmp_path: Path) -> None:
    assert newest(open_checkpoints(tmp_path)) == (None, [])
    partial(make(tmp_path, 5))
    assert (
        newest(open_checkpoints(tmp_path))[0] is None
    )  # the first one was never finished: there is nothing to lose
    another_format(make(tmp_path, 10)), corrupt(make(tmp_path, 20))
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints in .* can be used: .*step-00000020"
    ) as caught:
        newest(open_checkpoints(tmp_path))
    assert "(and 1 more)" in caught.value.message
    assert "move these directories away" in caught.value.hint
    make(tmp_path, 6)
    found, refused = newest(open_checkpoints(tmp_path))
    assert found is not None
    assert (found.step, len(refused)) == (6, 2)
    with pytest.raises(CheckpointError, match="no usable 'counters'"):
        newest(open_checkpoints(tmp_path), {"counters": dict})


def test_who_only_names_checkpoints_learns_that_none_can_be_read(tmp_path: Path) -> None:
    check_readable(open_checkpoints(tmp_path / "missing"))
    another_format(make(tmp_path, 5))
    partial(make(tmp_path, 6))
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .* can be used: .*step-00000005 has format 2"
    ):
        check_readable(open_checkpoints(tmp_path))
    corrupt(make(tmp_path, 4))  # its files are read by whoever uses it
    check_readable(open_checkpoints(tmp_path))


def test_a_place_that_is_no_directory_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be read"):
        newest(open_checkpoints(tmp_path / "file"))
    assert retention(open_checkpoints(tmp_path / "file"), 1).damaged
    assert retention(open_checkpoints(tmp_path / "missing"), 1) == Retention()


def test_parts_of_a_manifest_that_are_not_there_are_named(tmp_path: Path) -> None:
    found = checkpoint_at(make(tmp_path, 5, counters={"steps": 3, "on": True}, config=[]))
    assert found.part("counters.steps", int) == 3
    for where, kind in (
        ("counters.on", int),
        ("counters.x", int),
        ("config.model", dict),
        ("steps.a.b", str),
    ):
        with pytest.raises(CheckpointError, match=f"no usable '{where}'"):
            found.part(where, kind)
    with pytest.raises(CheckpointError, match=r"config\.model"):
        check_fits(found, {}, "aaa")


def test_the_tokenizer_beside_checkpoints_is_the_one_of_the_manifest(tmp_path: Path) -> None:
    place = tmp_path / checkpoints.TOKENIZER
    place.mkdir()
    (place / "tokenizer.json").write_text("{}")
    found = checkpoint_at(make(tmp_path, 5, tokenizer=open_checkpoints(tmp_path).tokenizer_entries()))
    verify_tokenizer(found)
    (place / "chat_template.jinja").write_text("planted")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not of it"):
        verify_tokenizer(found)
    (place / "chat_template.jinja").unlink()
    (place / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"hash of tokenizer\.json differs"):
        verify_tokenizer(found)
    (place / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        verify_tokenizer(found)


def test_another_model_or_tokenizer_is_refused_naming_the_keys(tmp_path: Path) -> None:
    stored = {"config": {"model": {"d_model": 8, "n_layers": 2}}, "fingerprints": {"tokenizer": "aaa"}}
    checkpoint = checkpoint_at(make(tmp_path, 5, **stored))
    check_fits(checkpoint, {"d_model": 8, "n_layers": 2}, "aaa")
    with pytest.raises(CheckpointError, match="n_layers: 2 there, 3 here") as caught:
        check_fits(checkpoint, {"d_model": 8, "n_layers": 3}, "aaa")
    assert "d_model" not in caught.value.message
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_fits(checkpoint, {"d_model": 8, "n_layers": 2}, "bbb")


def test_how_experts_lie_on_workers_is_not_the_model_s(tmp_path: Path) -> None:
    model = {"d_model": 8, "moe": {"experts": 4, "expert_parallel": True}}
    stored = {"config": {"model": model}, "fingerprints": {"tokenizer": "aaa"}}
    checkpoint = checkpoint_at(make(tmp_path, 5, **stored))
    check_fits(checkpoint, {**model, "moe": {"experts": 4, "expert_parallel": False}}, "aaa")
    with pytest.raises(CheckpointError, match="another model"):
        check_fits(checkpoint, {**model, "moe": {"experts": 8, "expert_parallel": True}}, "aaa")
    with pytest.raises(CheckpointError, match="another model"):
        check_fits(checkpoint, {**model, "moe": None}, "aaa")


def test_the_control_plane_reads_checkpoints_without_torch() -> None:
    code = "import sys, escala.storage.checkpoints; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

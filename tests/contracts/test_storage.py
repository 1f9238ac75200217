"""What each store of checkpoints and each store of files promises: a local directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import pytest

from escala.contract.checkpoints import FORMAT_VERSION, MANIFEST, checkpoint_name
from escala.contract.errors import CheckpointError
from escala.contract.records import Control, JobFiles
from escala.contract.sealed import seal
from escala.storage.base import CheckpointStore, FileStore
from escala.storage.checkpoints import (
    checkpoint_at,
    latest,
    list_checkpoints,
    open_checkpoints,
    read_checkpoint,
    retention,
    verify,
    verify_tokenizer,
)
from escala.storage.files import open_files, read_stored, write_stored

FILES = ("rank-0.safetensors", "rank-1.safetensors")
Damage = Callable[[CheckpointStore, str, str], None]


def damage_local(store: CheckpointStore, name: str, file: str) -> None:
    """Change a byte of a file behind the store's back."""
    path = Path(store.address, name, file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=[damage_local], ids=["local"])
def damage(request: pytest.FixtureRequest) -> Damage:
    return request.param


@pytest.fixture
def store(damage: Damage, tmp_path: Path) -> CheckpointStore:
    return {damage_local: open_checkpoints(tmp_path / "checkpoints")}[damage]


def content(step: int, file: str) -> bytes:
    return f"{file} of {step}".encode() * 1000


def put(store: CheckpointStore, step: int, file: str) -> dict[str, object]:
    return store.put(checkpoint_name(step), file, lambda path: path.write_bytes(content(step, file)) and None)


def write(store: CheckpointStore, step: int, replace: bool = True) -> str | None:
    """A checkpoint, its files by two writers with stores of their own."""
    store.begin(checkpoint_name(step))
    files = {file: put(open_checkpoints(store.address), step, file) for file in FILES}
    facts = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    manifest = seal(facts | {"tokenizer": store.tokenizer_entries()})
    return store.publish(checkpoint_name(step), manifest, replace=replace)


def test_what_is_written_is_read(store):
    assert store.names() == []
    assert latest(store) == (None, [])
    assert write(store, 5) is None
    found, refused = latest(store)
    assert (found.step, refused) == (5, [])
    assert found == checkpoint_at(found.address)
    assert found.size_bytes == sum(len(content(5, file)) for file in FILES)
    assert store.size_bytes(found.name) > found.size_bytes  # its manifest, too
    with store.local(found.name, FILES[0]) as path:
        assert path.read_bytes() == content(5, FILES[0])
    with store.open(found.name, FILES[1]) as stream:
        stream.seek(100)
        assert stream.read(50) == content(5, FILES[1])[100:150]
    with pytest.raises(OSError, match="missing"):
        store.open(found.name, "missing")


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_storage import FILES, checkpoint_name, content, open_checkpoints, put
store = open_checkpoints(sys.argv[1])
store.begin(checkpoint_name(10))
put(store, 10, FILES[0])
store.put(checkpoint_name(10), FILES[1], lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), 9)) and None)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_counts(store):
    write(store, 5)
    here = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", KILLED, store.address, here], check=False).returncode == -9
    found, refused = latest(store)
    assert found.step == 5
    assert all(checkpoint_name(10) in str(error) for error in refused)
    assert [c.step for c in list_checkpoints(store)] == [5]
    write(store, 10)
    assert latest(store)[0].step == 10
    assert retention(store, 2).delete == []
    assert len(store.names()) == 2


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(store, damage, file):
    write(store, 5), write(store, 10)
    damage(store, checkpoint_name(10), file)
    found, (error,) = latest(store)
    assert found.step == 5
    assert checkpoint_name(10) in error.message
    assert file == MANIFEST or file in error.message


def test_what_is_verified_once_is_noticed_when_it_changes(store, damage):
    write(store, 5), write(store, 10), write(store, 15)
    assert retention(store, 2).delete == [checkpoint_name(5)]
    damage(store, checkpoint_name(15), FILES[0])
    kept = retention(store, 1)
    assert kept.delete == [checkpoint_name(5)]
    assert checkpoint_name(15) in kept.damaged[0].message


def test_retention_keeps_the_newest_and_deletes_the_others(store):
    for step in (5, 10, 15):
        write(store, step)
    store.begin(checkpoint_name(12))  # stale: a later one is there
    store.begin(checkpoint_name(20))  # perhaps being written
    for name in retention(store, 2).delete:
        store.delete(name)
        store.delete(name)  # it is gone already
    assert [c.step for c in list_checkpoints(store)] == [10, 15]
    assert len(store.names()) == 3


def test_a_new_one_takes_the_place_of_one_of_its_step(store, damage):
    write(store, 5)
    assert write(store, 5, replace=True) is None
    assert store.names() == [checkpoint_name(5)]
    damage(store, checkpoint_name(5), FILES[0])
    aside = write(store, 5, replace=False)
    assert aside in store.names()
    found, refused = latest(store)
    assert (found.step, refused) == (5, [])
    assert aside in retention(store, 1).damaged[0].message


def test_readers_at_the_same_time_see_whole_checkpoints(store):
    """While one is written again and again, each reader finds a good one."""
    write(store, 5)

    def read(_: int) -> int:
        for _ in range(20):
            found, _ = latest(open_checkpoints(store.address))
            assert found is not None
        return 1

    with ThreadPoolExecutor(4) as pool:
        readers = pool.map(read, range(4))
        for step in range(6, 16):
            write(store, step)
        assert sum(readers) == 4


def test_the_tokenizer_is_the_one_of_the_manifest(store, tmp_path):
    source = tmp_path / "source.json"
    source.write_text("{}")
    store.put_tokenizer({"tokenizer.json": source, "chat_template.jinja": source}, replace=False)
    assert sorted(store.tokenizer_entries()) == ["chat_template.jinja", "tokenizer.json"]
    write(store, 5)
    found = read_checkpoint(store, checkpoint_name(5))
    verify(found), verify_tokenizer(found)
    source.write_text("[]")
    store.put_tokenizer({"tokenizer.json": source}, replace=False)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json differs"):
        verify_tokenizer(found)
    source.write_text("{}")
    store.put_tokenizer({"tokenizer.json": source}, replace=True)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is missing"):
        verify_tokenizer(found)


def test_a_place_without_room_says_so(store):
    store.begin(checkpoint_name(5))

    def fail(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space"):
        store.put(checkpoint_name(5), FILES[0], fail)
    assert latest(store)[0] is None


CONTROL = JobFiles(Path(), "j1").attempt(1).control


@pytest.fixture(params=["local"])
def files(tmp_path: Path) -> FileStore:
    return open_files(tmp_path / "home")


def test_a_file_is_written_whole_and_read_in_part(files):
    with pytest.raises(FileNotFoundError):
        files.read(CONTROL)
    assert not files.exists(CONTROL.parent)
    files.write(CONTROL, b"first")
    files.write(CONTROL, b"second")
    assert files.read(CONTROL) == files.local(CONTROL).read_bytes() == b"second"
    assert files.read(CONTROL, 3) == b"ond"
    assert files.read(CONTROL, 99) == b""
    assert files.exists(CONTROL)
    assert files.exists(CONTROL.parent)
    with pytest.raises((OSError, ValueError)):
        files.read(CONTROL.parent)


def test_readers_see_the_old_file_or_the_new_one(files):
    contents = {bytes([65 + n]) * 100_000 for n in range(8)}
    files.write(CONTROL, min(contents))

    def read(_: int) -> bool:
        return all(files.read(CONTROL) in contents for _ in range(50))

    with ThreadPoolExecutor(3) as pool:
        readers = pool.map(read, range(3))
        for content in sorted(contents):
            files.write(CONTROL, content)
        assert all(readers)


def test_a_record_is_stored_and_a_damaged_one_is_set_aside(files):
    assert read_stored(files, Control, CONTROL) is None
    write_stored(files, CONTROL, Control("user"))
    assert read_stored(files, Control, CONTROL) == Control("user")
    files.write(CONTROL, b"{")
    assert read_stored(files, Control, CONTROL) is None
    assert not files.exists(CONTROL)


def test_a_folder_is_written_once_and_as_a_whole(files):
    name = PurePath("code", "abc")
    files.write_folder(name, {"a.py": b"1", "package/b.py": b"2"})
    files.write_folder(name, {"a.py": b"another"})
    assert files.read(name / "a.py") == b"1"
    assert files.read(name / "package" / "b.py") == b"2"
    with pytest.raises(OSError, match="too long"):
        files.write_folder(PurePath("code", "def"), {"a.py": b"1", "x" * 300: b"2"})
    assert not files.exists(PurePath("code", "def"))


def test_several_may_write_a_folder_at_once(files):
    name, contents = PurePath("code", "abc"), {f"{n}.py": b"1" for n in range(20)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: files.write_folder(name, contents), range(8)))
    assert sorted(p.name for p in files.local(name).iterdir()) == sorted(contents)

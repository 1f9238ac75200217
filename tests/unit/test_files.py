"""Files that others rely on: whole and on the disk, set aside where damaged, written later on a full disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from escala.contract import fields, files, lines
from escala.contract.attempt import check_fence
from escala.contract.errors import Superseded, VersionError
from escala.contract.files import forgiving_log, insist, no_room, private_directory, rename_whole, write_whole
from escala.contract.records import (
    FORMAT,
    AttemptFiles,
    AttemptSpec,
    Control,
    Outcome,
    Progress,
    read_record,
    write_json,
)
from escala.tracking.delivery import _State
from escala.tracking.spool import SpoolTracker, close_spool, read_events
from escala.tracking.tracker import Metric
from tests.small_disk import Disk

GOOD = Progress(1, 2, 64, 1e6, 1.0, 5.0, 64.0, None, 1.0)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: "sync NAME" of files and directories, "rename NAME"."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def record_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record(act):
        def call(source: object, target: object) -> None:
            done.append(f"rename {Path(str(target)).name}")
            act(source, target)

        return call

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record(replace))
    monkeypatch.setattr(os, "rename", record(rename))
    return done


def test_a_file_is_on_the_disk_before_its_name_and_its_directory_after(
    tmp_path: Path, synced: list[str]
) -> None:
    write_json(tmp_path / "a.json", GOOD)
    temporary, renamed, directory = synced
    assert temporary.startswith("sync .a.json.")
    assert (renamed, directory) == ("rename a.json", f"sync {tmp_path.name}")


def test_so_is_a_directory(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "file").write_text("x")
    rename_whole(tmp_path / "new", tmp_path / "final")
    assert sorted(synced[:3]) == ["sync deep", "sync file", "sync new"]
    assert synced[3:] == ["rename final", f"sync {tmp_path.name}"]


DAMAGE = {
    "empty": b"",
    "cut": b'{"step": 1',
    "zeros": bytes(100),
    "not UTF-8": b'{"step": "\xff\xfe"}',
    "an array": b"[]",
    "null": b"null",
    "too deep": b"[" * 100_000,
    "a text for a number": json.dumps({**GOOD.__dict__, "step": "7"}).encode(),
    "true for a number": json.dumps({**GOOD.__dict__, "train_tokens": True}).encode(),
    "beyond int64": json.dumps({**GOOD.__dict__, "train_tokens": 2**70}).encode(),
    "an int beyond all floats": json.dumps({**GOOD.__dict__, "compute_flops": 10**400}).encode(),
    "a missing key": json.dumps({"step": 1}).encode(),
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record_is_set_aside_and_told_once(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "progress.json"
    path.write_bytes(content)
    for _ in range(3):
        assert read_record(Progress, path) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert (tmp_path / "progress.json.damaged").read_bytes() == content
    write_json(path, GOOD)
    assert read_record(Progress, path) == GOOD


@pytest.mark.parametrize("kind", [AttemptSpec, Control, Outcome, Progress, _State])
def test_every_kind_of_record(tmp_path: Path, kind: type) -> None:
    for number, content in enumerate(DAMAGE.values()):
        path = tmp_path / str(number)
        path.write_bytes(content)
        assert read_record(kind, path) is None or kind is _State  # which needs no key
    assert read_record(kind, tmp_path / "none") is None
    assert read_record(kind, tmp_path / "1" / "none") is None
    (tmp_path / "directory").mkdir()
    assert read_record(kind, tmp_path / "directory") is None


def test_keys_of_a_newer_version_are_left_out() -> None:
    assert fields.build(Control, {"stop": "user", "new": 1}) == Control("user")
    assert fields.build(Outcome, {"kind": "succeeded", "record": {"a": [1]}}).record == {"a": [1]}
    with pytest.raises(ValueError, match="stop is 1, and not str"):
        fields.build(Control, {"stop": 1})


def test_a_huge_record_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30)
    assert read_record(Progress, tmp_path / "huge") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_record(Progress, tmp_path / "pipe") is None


def test_a_damaged_fence_forbids_nothing(tmp_path: Path) -> None:
    attempt = AttemptFiles(tmp_path / "job" / "attempt-1")
    attempt.directory.mkdir(parents=True)
    for content in (b"", b"\xff\xfe", b"{", b"\0\0"):
        attempt.current.write_bytes(content)
        check_fence(attempt, 1)
    attempt.current.write_text("2")
    with pytest.raises(Superseded):
        check_fence(attempt, 1)


def test_a_line_after_a_cut_one_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":')
    assert lines.objects(path) == [{"a": 1}]
    lines.append(path, b'{"c":2}\n')
    lines.append(path, b'{"d":3}\n')
    assert lines.objects(path) == [{"a": 1}, {"c": 2}, {"d": 3}]
    assert lines.objects(tmp_path / "none") == []
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    assert lines.objects(tmp_path / "pipe") == lines.objects(tmp_path) == []


def test_a_line_without_end_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":1}\n' + b"x" * 1050 + b'\n{"b":2}\n' + b"y" * 300)
    assert lines.objects(path) == [{"a": 1}, {"b": 2}]
    assert [offset for _, offset in lines.whole(path)] == [8, 1059, 1067]


def test_no_room_is_known_wherever_it_comes_from() -> None:
    wrapped = RuntimeError("while writing")
    wrapped.__cause__ = ValueError("while closing")
    wrapped.__cause__.__context__ = OSError(errno.ENOSPC, "full")
    assert no_room(wrapped)
    assert no_room(OSError(errno.EDQUOT, "quota"))
    assert no_room(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not no_room(OSError(errno.EACCES, "no"))
    assert not no_room(None)


def test_insist_waits_for_room_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    left = [3]

    def act() -> str:
        left[0] -= 1
        if left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "done"

    assert insist(act, "a thing", every=0.001) == "done"
    assert capsys.readouterr().err.count("no room on the disk for a thing") == 1

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        insist(refuse, "a thing", every=0.001)


def test_a_private_directory(tmp_path: Path) -> None:
    private_directory(tmp_path / "a" / "home")
    (tmp_path / "there").mkdir(mode=0o755)
    private_directory(tmp_path / "there")
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "full").chmod(0o755)
    private_directory(tmp_path / "full")  # somebody else's things may be in it
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a/home", "there", "full")]
    assert modes == [0o700, 0o700, 0o755]


# A disk that is really full


def test_a_full_disk_keeps_the_old_file_whole(disk: Disk) -> None:
    path = disk.path / "x.json"
    write_whole(path, "old")
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new" * 100_000)
    assert path.read_text() == "old"
    disk.free()
    write_whole(path, "new")
    assert sorted(p.name for p in disk.path.iterdir()) == ["x.json"]


def test_a_log_on_a_full_disk_costs_lines_only(disk: Disk) -> None:
    with forgiving_log(disk.path / "log") as log:
        print("first", file=log)
        disk.fill()
        for _ in range(1000):
            print("x" * 1000, file=log)
        disk.free()
        print("la\ud800st", file=log)
    assert (disk.path / "log").read_text().splitlines()[-1].endswith(r"la\ud800st")


def test_a_spool_on_a_full_disk_loses_no_event(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    spool = SpoolTracker(disk.path / "spool")
    spool.start("j-1", "e", "name", {}, {})
    disk.fill()
    for step in range(200):
        spool.metrics("", [Metric(f"loss{'x' * 100}", float(step), step, 1)])
    spool.tags("", {"a": "b"})
    assert capsys.readouterr().err.count("no room") == 1
    before = [e["event"] for e in read_events(disk.path / "spool")]
    assert len(before) < 200
    disk.free()
    spool.finish("", "FINISHED")
    spool.drain()
    events = list(read_events(disk.path / "spool"))
    assert [e["event"] for e in events] == ["start", *["metrics"] * 200, "tags", "finish"]
    assert [e["points"][0][2] for e in events[1:201]] == list(range(200))
    assert all(line.count(b'"event"') == 1 for line in next((disk.path / "spool").iterdir()).open("rb"))


def test_drain_waits_for_room(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    spool = SpoolTracker(disk.path / "spool")
    spool.start("j-1", "e", "name", {}, {})
    disk.fill()
    spool.text("", "a.txt", "x" * 20_000)
    spool.finish("", "FINISHED")
    waiting = threading.Thread(target=spool.drain)
    waiting.start()
    disk.free()
    waiting.join(10)
    assert not waiting.is_alive()
    assert [e["event"] for e in read_events(disk.path / "spool")] == ["start", "text", "finish"]


def test_what_waits_in_memory_is_bounded(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    from escala.tracking import spool as module

    monkeypatch.setattr(module, "WAITING_METRICS_BYTES", 10_000)
    spool = SpoolTracker(disk.path / "spool")
    spool.start("j-1", "e", "name", {}, {})
    disk.fill()
    for step in range(2000):
        spool.metrics("", [Metric("loss", 1.0, step, 1)])
    assert spool._waiting_bytes < 12_000
    disk.free()
    spool.finish("", "FINISHED")
    events = list(read_events(disk.path / "spool"))
    dropped = [int(e["tags"][module.DROPPED_TAG]) for e in events if e["event"] == "tags"][-1]
    assert dropped + sum(e["event"] == "metrics" for e in events) == 2000


def test_a_cut_line_does_not_keep_a_spool_open(tmp_path: Path) -> None:
    SpoolTracker(tmp_path).start("j-1", "e", "name", {}, {})
    with next(tmp_path.glob("*.jsonl")).open("ab") as file:
        file.write(b'{"event":"metrics","poi{"event":"tags"}\n{"event":"metr')
    close_spool(tmp_path, "FAILED")
    close_spool(tmp_path, "FAILED")
    assert [e["event"] for e in read_events(tmp_path)] == ["start", "finish"]


def test_a_spool_that_cannot_be_closed_says_so_and_is_closed_later(disk: Disk) -> None:
    SpoolTracker(disk.path / "spool").start("j-1", "e", "name", {}, {})
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        close_spool(disk.path / "spool", "FAILED")
    disk.free()
    close_spool(disk.path / "spool", "FAILED")
    assert [e["event"] for e in read_events(disk.path / "spool")] == ["start", "finish"]


def test_set_aside_where_nothing_can_be_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files.set_aside(tmp_path / "gone", "it is damaged")
    assert "cannot be set aside" in caplog.text


def test_a_record_says_its_format_and_a_newer_one_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    write_json(path, Control("user"))
    assert json.loads(path.read_text()) == {"format": FORMAT, "stop": "user"}
    path.write_text('{"stop": "user"}')  # as escala 0.1 wrote it
    assert read_record(Control, path) == Control("user")
    path.write_text(json.dumps({"stop": "user", "format": FORMAT + 1}))
    with pytest.raises(VersionError, match=rf"control\.json has format {FORMAT + 1}"):
        read_record(Control, path)
    assert path.exists()  # it is not damaged

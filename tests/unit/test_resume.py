"""What a run goes on from, and how a new checkpoint takes its place among damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from escala import Escala
from escala.contract.checkpoints import (
    FORMAT_VERSION,
    MANIFEST,
    PARTIAL,
    TOKENIZER,
    checkpoint_name,
    file_entry,
)
from escala.contract.errors import CheckpointError
from escala.contract.files import no_room
from escala.contract.records import JobFiles
from escala.contract.sealed import seal
from escala.jobs import retention
from escala.schema import ModelConfig
from escala.schema.pretrained import model_config_of
from escala.storage.checkpoints import latest, open_checkpoints, verify_tokenizer
from tests.small_disk import Disk
from workloads.model.start import checkpoint_config, find_checkpoint, load_tokenizer
from workloads.model.weights import load_weights
from workloads.training import zero
from workloads.training.checkpoint import _begin, _publish, save
from workloads.training.run import choose_checkpoint, keep_tokenizer

MODEL = ModelConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2)


def make(directory: Path, step: int, **changes: Any) -> Path:
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "rank.safetensors").write_bytes(b"weights")
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {"rank.safetensors": file_entry(path / "rank.safetensors")},
        "workload": "pretrain",
        "config": {"model": MODEL.model_dump(mode="json")},
        "fingerprints": {"tokenizer": "aaa"},
        "adam_step": step,
        "counters": {"train_tokens": 5, "compute_flops": 1e3},
        "tokenizer": open_checkpoints(directory).tokenizer_entries(),
    }
    (path / MANIFEST).write_text(json.dumps(seal(manifest | changes)))
    return path


def chosen(own: Path, other: Path | None = None, model: ModelConfig = MODEL) -> Any:
    spec: Any = SimpleNamespace(checkpoints=str(own), trunk=None, resume_from=other and str(other))
    config: Any = SimpleNamespace(model=model)
    return choose_checkpoint(spec, config, "aaa")


def test_nothing_yet_starts_at_step_0(tmp_path: Path) -> None:
    assert chosen(tmp_path) is None
    (tmp_path / (checkpoint_name(1) + PARTIAL)).mkdir()
    assert chosen(tmp_path) is None


def test_exact_attention_with_a_window_goes_on_as_window(tmp_path: Path) -> None:
    """So it was written before there was a kind of that name."""
    plain = {**MODEL.model_dump(mode="json"), "window_tokens": 8}
    del plain["features"]
    assert plain["attention"] == "exact"
    make(tmp_path, 3, config={"model": plain})
    assert chosen(tmp_path, model=ModelConfig(**plain)).step == 3
    with pytest.raises(CheckpointError, match="attention: window there, hybrid here"):
        chosen(tmp_path, model=ModelConfig(**{**plain, "attention": "hybrid"}))


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"counters": {}}, {"config": {}}, {"adam_step": None}]
)
def test_all_refused_stops_the_job_whatever_else_it_could_start_from(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "own", 5, **change)
    make(tmp_path / "other", 7)
    for other in (None, tmp_path / "other"):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints in .*step-00000005") as caught:
            chosen(tmp_path / "own", other)
        assert caught.value.kind == "user_error"  # a class of failure that is not retried
    make(tmp_path / "own", 4)
    assert chosen(tmp_path / "own").step == 4  # the older good one
    assert "refused: checkpoint" in capsys.readouterr().err


def test_another_job_without_a_good_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="to resume from"):
        chosen(tmp_path / "own", tmp_path / "other")
    make(tmp_path / "other", 7, format_version=1)
    with pytest.raises(CheckpointError, match="format 1"):
        chosen(tmp_path / "own", tmp_path / "other")


def test_a_start_whose_checkpoints_are_refused_says_why(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") is None
    assert find_checkpoint(tmp_path) is None
    path = make(tmp_path, 5, format_version=1)
    for place in (tmp_path, path):
        with pytest.raises(CheckpointError, match="format 1; this version reads"):
            find_checkpoint(place)
    (path / MANIFEST).unlink()
    for place in (tmp_path, path):  # not taken for a Hugging Face directory without config.json
        with pytest.raises(CheckpointError, match="step-00000005 has no usable manifest"):
            find_checkpoint(place)
    make(tmp_path, 4)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4
    make(tmp_path, 6, workload=None)
    assert find_checkpoint(tmp_path) == found
    with pytest.raises(CheckpointError, match="damaged: rank"):
        load_weights(found)


@pytest.mark.parametrize("change", [{"workload": "unknown"}, {"config": {"modell": 1}}])
def test_a_configuration_that_this_version_does_not_know(tmp_path: Path, change: dict[str, Any]) -> None:
    found = find_checkpoint(make(tmp_path, 5, **change))
    assert found is not None
    with pytest.raises(CheckpointError, match="does not validate here"):
        checkpoint_config(found)


def test_a_new_checkpoint_sets_a_damaged_one_of_its_step_aside(tmp_path: Path) -> None:
    store, tokenizer = open_checkpoints(tmp_path), tmp_path / TOKENIZER
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    make(tmp_path, 5, format_version=1)
    for number, others in ((1, 1), (2, 1)):  # the second time a good one is replaced: nothing is left of it
        name, content = checkpoint_name(5), b"new %d" % number
        assert _begin(store, name) == ""
        entry = store.put(name, "rank.safetensors", lambda path, content=content: path.write_bytes(content))
        manifest = {"format_version": FORMAT_VERSION, "step": 5, "files": {"rank.safetensors": entry}}
        assert _publish(store, name, manifest) == []
        found, refused = latest(store)
        assert found is not None
        assert refused == []
        assert store.open(name, "rank.safetensors").read() == content
        verify_tokenizer(found)
        assert len(list(tmp_path.glob("step-00000005.damaged-*"))) == others


def test_a_checkpoint_that_cannot_be_published_is_told(tmp_path: Path) -> None:
    assert "FileNotFoundError" in _publish(open_checkpoints(tmp_path), checkpoint_name(5), {})[0]


def test_the_tokenizer_is_kept_while_it_is_whole_and_copied_again_where_it_is_not(tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_text("{}")
    own = tmp_path / "own"
    keep_tokenizer(source, open_checkpoints(own), None)
    found = find_checkpoint(make(own, 5))
    kept = own / TOKENIZER / "tokenizer.json"
    source.write_text("{ }")  # the same tokenizer as another version writes it
    keep_tokenizer(source, open_checkpoints(own), found)
    assert kept.read_text() == "{}"
    kept.write_text("[]")
    with pytest.raises(CheckpointError, match=r"hash of tokenizer\.json differs"):
        load_tokenizer(own)
    source.write_text("{}")
    keep_tokenizer(source, open_checkpoints(own), found)
    assert kept.read_text() == "{}"


def test_the_model_of_a_job_is_known_from_its_newest_usable_manifest(tmp_path: Path) -> None:
    make(tmp_path, 99_999_999)
    make(
        tmp_path, 100_000_000, config={"model": MODEL.model_dump() | {"n_layers": 3}}
    )  # newer, though it sorts before
    assert model_config_of(tmp_path).n_layers == 3
    for text in ("[" * 100_000, "{", '{"config": 7}', '{"config": {"model": {"n_layers": -1}}}'):
        (tmp_path / checkpoint_name(100_000_000) / MANIFEST).write_text(text)
        assert model_config_of(tmp_path).n_layers == 1
    (tmp_path / checkpoint_name(99_999_999) / MANIFEST).write_text("")
    with pytest.raises(ValueError, match="step-100000000 has no usable manifest"):
        model_config_of(tmp_path)


def test_gc_frees_good_ones_and_reports_damaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = JobFiles(tmp_path, "j1").checkpoints
    for step in (5, 6, 7):
        make(checkpoints, step)
    make(checkpoints, 8, format_version=2)
    job = SimpleNamespace(id="j1", state="failed", config={})
    store = SimpleNamespace(list=lambda states: [job], get=lambda name: job)
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path))
    monkeypatch.setattr(retention, "open_store", lambda _: nullcontext(store))
    found = Escala().collect_garbage(keep=2)
    assert [Path(each.path).name for each in found.checkpoints] == ["step-00000005"]
    (damaged,) = found.damaged
    assert "step-00000008 has format 2" in damaged
    Escala().collect_garbage("j1", keep=1, delete=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000007", "step-00000008"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process as the only rank."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_disk_without_room_for_the_directory_is_told_as_full(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "parameter_shapes", lambda engine: {"w": (2,)})
    monkeypatch.setattr(zero, "link_state", lambda engine: None)
    monkeypatch.setattr(zero, "gather_state", lambda *_: torch.ones(2))
    monkeypatch.setattr(zero, "adam_step", lambda engine: 3)
    engine, store = (
        SimpleNamespace(zero_optimization_stage=lambda: 0),
        open_checkpoints(disk.path / "checkpoints"),
    )
    disk.fill()
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save(engine, store, 7, {}, keep=2)
    assert no_room(caught.value)  # so that the loop waits, and tries again
    disk.free()
    assert save(engine, store, 7, {}, keep=2).step == 7

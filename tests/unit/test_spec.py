"""Specs: the grammar (defaults < files < overrides), and what each mistake says."""

import math

import pytest

from escala.contract.errors import NotFoundError, SpecError
from escala.spec import load_job, merge, resolve, written


def test_defaults_are_a_valid_job() -> None:
    spec = load_job("pretrain")
    assert spec.entry_point == "workloads.pretrain"
    assert spec.options.priority == 50
    assert spec.config.training.zero_stage == 3


def test_a_later_file_and_then_an_override_win(tmp_path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {d_model: 128, n_layers: 2}\njob: {priority: 10, retries: 0}\n")
    second.write_text("model: {n_layers: 3}\n")
    spec = load_job(
        "pretrain", [first, second], ["training.optimizer.learning_rate=1e-3"], {"priority": 70, "name": None}
    )
    assert (spec.config.model.d_model, spec.config.model.n_layers) == (128, 3)
    assert spec.config.training.optimizer.learning_rate == 1e-3
    assert (spec.options.priority, spec.options.retries) == (70, 0)


def test_an_override_reaches_into_a_list(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"data: {{corpora: [{{kind: files, root: {tmp_path}}}]}}\n")
    spec = load_job("pretrain", [file], ["data.corpora.0.weight=2"])
    assert spec.config.data.corpora[0].weight == 2
    with pytest.raises(SpecError, match="not an index of a list of 1"):
        load_job("pretrain", [file], ["data.corpora.1.weight=2"])


@pytest.mark.parametrize(
    ("override", "says", "hint"),
    [
        ("model.n_layer=3", "unknown key model.n_layer", "did you mean n_layers?"),
        ("modle.n_layers=3", "unknown key modle", "did you mean model?"),
        ("data.corpora=[{kind: files, root: /, glob: x}]", "unknown key", "did you mean globs?"),
        ("training.optimizer.lr=3", "unknown key training.optimizer.lr", "learning_rate"),
        ("model.n_layers=three", "model.n_layers", "--dry-run"),
        ("model.n_layers", "not of the form", "--set model.n_layers=6"),
        ("model.n_heads=3", "not a multiple of n_heads 3", ""),
        ("training.batch_sequences=3", "not a multiple of workers", ""),
        ("training.context_tokens=100000", "longer than", ""),
    ],
)
def test_a_mistake_says_what_and_how_to_mend(override: str, says: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_job("pretrain", [], ["resources.workers=2", override])
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_a_missing_or_broken_file_is_named(tmp_path) -> None:
    with pytest.raises(NotFoundError, match=r"no\.yaml"):
        load_job("pretrain", [tmp_path / "no.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1, \n")
    with pytest.raises(SpecError, match="line"):
        load_job("pretrain", [broken])
    broken.write_text("- a list\n")
    with pytest.raises(SpecError, match="holds a list"):
        load_job("pretrain", [broken])
    with pytest.raises(SpecError, match="did you mean pretrain"):
        load_job("pretrian")


def test_resolve_counts_tokens_and_flops() -> None:
    resolved = resolve(
        load_job("pretrain", [], ["training.train_tokens=100_000", "training.batch_sequences=8"])
    )
    assert resolved.derived["training.steps"] == -(-100_000 // (8 * 256))
    assert resolved.train_tokens == resolved.derived["training.steps"] * 8 * 256 >= 100_000
    assert resolved.compute_flops == resolved.flops_per_token * resolved.train_tokens
    assert resolved.flops_per_token > 6 * resolved.n_non_embedding


def test_merge_replaces_lists_and_merges_mappings() -> None:
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}


def test_a_relative_path_is_resolved_where_it_was_typed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = load_job("pretrain", [], ["data.corpora=[{kind: files, root: notes}]"])
    assert spec.plain()["data"]["corpora"][0]["root"] == str(tmp_path / "notes")


@pytest.mark.parametrize(
    "override",
    [
        "training.train_tokens=yes", "training.train_tokens=1:30", "training.optimizer.learning_rate=.inf",
        "training.optimizer.learning_rate=.nan", "training.optimizer.learning_rate=1e400",
        "training.optimizer.learning_rate='3e-3'", "training.steps=true", "training.zero_stage=true",
        "training.steps='5'", "training.steps=4.5", "training.steps=#5", "training.steps=", "training.steps=1e30",
        "model.tie_embeddings=yes", "model.tie_embeddings=1", "model.tie_embeddings='true'", "model.d_model=1e12",
        "model.n_layers=1e9", "model.n_layers=-1", "resources.workers=1e9",
        "resources.cpus_per_worker=.inf", "training.seed=1e19", "job.priority=true", "job.retries='2'",
        "job.max_flops=.inf", "job.max_seconds=1e30", "data.corpora[0].root=/x",
        "data.tokenizer.vocab_size=true", "training.batch_sequences=[16]",
    ],
)  # fmt: skip
def test_values_that_no_field_takes_are_refused_by_key(override: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_job("pretrain", [], [override])
    assert override.split("=")[0].removeprefix("job.").split("[")[0] in caught.value.message


def test_whole_floats_underscores_and_indices_in_brackets_are_read(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"data: {{corpora: [{{kind: files, root: {tmp_path}}}]}}\nmodel: {{d_model: 1.28e2}}\n")
    spec = load_job(
        "pretrain",
        [file],
        [
            "training.steps=4e3",
            "training.zero_stage=1.0",
            "data.corpora[0].root=/tmp/run #3",
            "training.seed=1_0",
        ],
    )
    training = spec.config.training
    assert (training.steps, training.zero_stage, training.seed) == (4000, 1, 10)
    assert spec.config.data.corpora[0].root == "/tmp/run #3"
    assert (spec.config.model.d_model, spec.config.model.head_dim) == (128, 32)


def test_a_mistake_in_a_file_is_shown_with_its_line(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("training:\n  steps: 5\n  optimizer: {learning_rate: .inf}\nmodel: {n_layer: 3}\n")
    with pytest.raises(SpecError) as caught:
        load_job("pretrain", [file])
    assert f"learning_rate ({file}, line 3)" in caught.value.message
    assert f"unknown key model.n_layer ({file}, line 4)" in caught.value.message


def test_a_mistake_is_shown_where_it_was_made(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("job:\n  priority: yes\n  nam: a\n")
    with pytest.raises(SpecError) as caught:
        load_job("pretrain", [], ["mode=1"], {"max_seconds": math.inf}, written([file], []))
    for said in (
        f"job.priority ({file}, line 2)",
        f"unknown key job.nam ({file}, line 3)",
        "(--max-seconds)",
    ):
        assert said in caught.value.message
    file.write_text("training: {steps: 5}\nmode:\n'':\n")
    with pytest.raises(SpecError) as caught:
        load_job("pretrain", base=written([file], []))
    assert f"unknown key mode ({file}, line 2); unknown key '' ({file}, line 3)" in caught.value.message


def test_an_item_of_a_list_that_no_file_writes_is_refused_with_what_to_write() -> None:
    for key in ("data.corpora[0].root", "data.corpora.0.root", "data.corpora[0]"):
        with pytest.raises(SpecError, match=r"no file writes data\.corpora, so it has no item 0") as caught:
            load_job("pretrain", [], [f"{key}=/x"])
        assert "--set 'data.corpora=[...]'" in caught.value.hint


def test_a_number_is_finite_in_fp32() -> None:
    with pytest.raises(SpecError, match="at most 3e"):
        load_job("pretrain", [], ["training.optimizer.learning_rate=1e39"])


def test_a_start_written_twice_is_not_lost(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("training: {steps: 10}\nmodel: {n_layers: 2}\ntraining: {batch_sequences: 8}\n")
    with pytest.raises(SpecError, match=r"training is there twice, in lines 1 and 3"):
        load_job("pretrain", [file])

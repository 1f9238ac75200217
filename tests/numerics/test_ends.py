"""Where answers begin and end: one set of end tokens, and one way to tokens, for all that read or write answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers

from escala.contract.errors import DataError
from escala.contract.records import AttemptSpec
from escala.schema import ModelConfig, SftConfig
from escala.storage.checkpoints import open_checkpoints
from tests.numerics.chain_model import chain, ids_of, path
from tests.numerics.small_tokenizers import CHATML, byte_level, sentencepiece, write
from workloads import sft
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.examples import Sequences
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.huggingface import save_pretrained
from workloads.model.start import load_tokenizer
from workloads.model.transformer import Transformer
from workloads.rewards.judge_models import LanguageModelJudge
from workloads.rewards.reward_model import RewardModel, answer_tokens, save_reward_model
from workloads.training.entry import Prepared
from workloads.training.finetune import open_tokenizer
from workloads.training.run import keep_tokenizer

USER = [{"role": "user", "content": "hi"}]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def ends(tokenizer: ChatTokenizer) -> set[str]:
    """The end tokens, spelled out; EOS is the first."""
    assert tokenizer.end_ids[0] == tokenizer.end_of_text
    return {str(tokenizer.tokenizer.id_to_token(number)) for number in tokenizer.end_ids}


@pytest.mark.parametrize(
    ("generation", "config", "template", "expected"),
    [
        (["<|eot_id|>", "<s>"], None, None, {"<|endoftext|>", "<|eot_id|>", "<s>"}),
        ("<|eot_id|>", ["<s>"], None, {"<|endoftext|>", "<|eot_id|>"}),  # config.json is not asked then
        (None, ["<s>"], None, {"<|endoftext|>", "<s>"}),
        ("null", ["<s>"], CHATML, {"<|endoftext|>", "<|im_end|>"}),
        (None, "<s>", CHATML, {"<|endoftext|>", "<|im_end|>", "<s>"}),
        (None, None, "{% for m in messages %}{{ m['content'] }}{% endfor %}", {"<|endoftext|>"}),
        (  # a user's turn that begins with a special token does not end the answer before it
            None,
            None,
            "{% for m in messages %}{{ '<s>' if m['role'] == 'user' else '<|im_start|>' }}{{ m['content'] }}"
            "{% endfor %}",
            {"<|endoftext|>"},
        ),
        (  # the last answer ends otherwise than an earlier one
            None,
            None,
            "{% for m in messages %}<s>{{ m['content'] }}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}"
            "{% endfor %}",
            {"<|endoftext|>", "<|eot_id|>", "<|im_end|>"},
        ),
        (  # earlier answers end as the default system prompt does
            None,
            None,
            "<|im_start|>system\nYou are.<|im_end|>{% for m in messages %}<|im_start|>"
            "{{ m['role'] + '\n' + m['content'] }}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}{% endfor %}",
            {"<|endoftext|>", "<|eot_id|>", "<|im_end|>"},
        ),
        (  # every turn is opened by the same token, and none is ended
            None,
            None,
            "<s>{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}{% endfor %}",
            {"<|endoftext|>"},
        ),
    ],
)
def test_ends_are_those_of_files_tokenizer_and_template(
    generation: Any, config: Any, template: str | None, expected: set[str], tmp_path: Path
) -> None:
    tokenizer = byte_level()

    def numbers(value: Any) -> Any:
        if value is None or value == "null":
            return None
        if isinstance(value, str):
            return tokenizer.token_to_id(value)
        return [tokenizer.token_to_id(token) for token in value]

    dictionary = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "special": True}
    write(tmp_path, tokenizer, template, eos_token=dictionary, pad_token="<|endoftext|>")
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": numbers(value)}))
    found = load_chat_tokenizer(tmp_path)
    assert ends(found) == expected
    found.save(tmp_path / "saved")  # an export, or what is kept beside checkpoints
    keep_tokenizer(tmp_path / "saved", open_checkpoints(tmp_path / "checkpoints"), None)
    for again in (tmp_path / "saved", tmp_path / "checkpoints" / "tokenizer"):
        assert load_chat_tokenizer(again) == found
        theirs = transformers.GenerationConfig.from_pretrained(again)
        assert theirs.eos_token_id == list(found.end_ids)


def test_the_models_ends_count_with_another_tokenizer_and_bad_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer", byte_level(), CHATML, eos_token="<|endoftext|>")
    model = tmp_path / "model"
    model.mkdir()
    file = model / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 8]}))
    tokenizer = load_chat_tokenizer(tmp_path / "tokenizer", model)
    assert set(tokenizer.end_ids) == {0, 7, 8, tokenizer.tokenizer.token_to_id("<|im_end|>")}
    for bad in ("</s>", [True], [-1], 1.5, "{"):
        file.write_text(bad if bad == "{" else json.dumps({"eos_token_id": bad}))
        with pytest.raises(DataError, match=r"generation_config\.json"):
            load_chat_tokenizer(tmp_path / "tokenizer", model)


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": CHATML}]
    write(tmp_path, byte_level(), None, eos_token="<|im_end|>", chat_template=several)
    with pytest.raises(DataError, match="no default"):
        load_chat_tokenizer(tmp_path)


def test_other_templates_and_ends_are_other_sequences(tmp_path: Path) -> None:
    one = load_chat_tokenizer(write(tmp_path / "1", byte_level(), CHATML, eos_token="<|im_end|>"))
    other = load_chat_tokenizer(write(tmp_path / "2", byte_level(), ZEPHYR, eos_token="<|im_end|>"))
    third = load_chat_tokenizer(write(tmp_path / "3", byte_level(), CHATML, eos_token="<|endoftext|>"))
    assert one.fingerprint == other.fingerprint == third.fingerprint
    assert len({one.identity, other.identity, third.identity}) == 3


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers "Hi", ends its turn, and would go on without end; EOS is another token."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    write(directory, tokenizer, CHATML, eos_token="<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    newline, h, i, end, j = ids_of(vocabulary, "Ċ", "H", "i", "<|im_end|>", "J")
    steps = path(newline, h, i, end, j, h)
    save_pretrained(chain(tokenizer.get_vocab_size(), steps), directory, 0)
    return directory


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({}, "Hi", "stop"),
        ({"stop": ("<|im_end|>",)}, "Hi", "stop"),
        ({"stop": ("<|im_end|>",), "ignore_eos": True}, "Hi", "stop"),
        ({"stop": ("i<|im_end|>J",), "ignore_eos": True}, "H", "stop"),
        ({"stop": ("nothing", "d|>J"), "ignore_eos": True}, "Hi", "stop"),
        ({"ignore_eos": True}, "HiJHiJHi", "length"),
        ({"stop_token_ids": "J", "ignore_eos": True}, "Hi", "stop"),
    ],
)
def test_the_engine_stops_at_every_end(
    two_ends: Path, params: dict[str, Any], text: str, reason: str
) -> None:
    from workloads.model.start import load_model

    tokenizer = load_tokenizer(two_ends)
    if "stop_token_ids" in params:
        params = {**params, "stop_token_ids": (tokenizer.tokenizer.token_to_id(params["stop_token_ids"]),)}
    engine = Engine(load_model(two_ends), tokenizer)
    (done,) = engine.generate(
        [tokenizer.prompt(USER)], SamplingParams(temperature=0, max_tokens=11, **params)
    )
    assert (done.text, done.finish_reason) == (text, reason)


@pytest.mark.parametrize("template", [None, LLAMA2, ZEPHYR])
def test_a_sentencepiece_answer_keeps_its_blank_and_its_tokens(template: str | None, tmp_path: Path) -> None:
    write(tmp_path, sentencepiece(), template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_chat_tokenizer(tmp_path)
    vocabulary = tokenizer.tokenizer.get_vocab()
    drawn = ids_of(vocabulary, "▁Paris", "▁is", "a", "<0xE4>", "<0xBD>", "<0xA0>", "</s>")
    for prompt in ("the", USER, [*USER, {"role": "assistant", "content": "a"}, *USER]):
        before = tokenizer.prompt(prompt)
        model = chain(tokenizer.vocab_size, path(before[-1], *drawn))
        (done,) = Engine(model, tokenizer).generate([before], SamplingParams(temperature=0, max_tokens=9))
        assert (done.text, done.token_ids) == (" Paris isa你", tuple(drawn))
        ids, answers = tokenizer.sequence(prompt, done.text)
        assert ids == [*before, *drawn]  # what the policy wrote is what SFT, DPO and reward models read
        assert answers == [False] * len(before) + [True] * len(drawn)
        assert answer_tokens(tokenizer, prompt, done.text) == ids
        if isinstance(prompt, str):
            assert ids[0] == vocabulary["<s>"]


def test_a_data_sets_answer_is_written_as_the_template_writes_it(tmp_path: Path) -> None:
    write(tmp_path, sentencepiece(), LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.sequence(USER, "Paris") == tokenizer.sequence(USER, " Paris")
    history = [*USER, {"role": "assistant", "content": "the"}, *USER]
    ids, answers = tokenizer.sequence(history, "Paris")
    assert tokenizer.decode([t for t, a in zip(ids, answers, strict=True) if a], special=True) == "Paris</s>"


@pytest.mark.parametrize(("template", "letters"), [(LLAMA2, ["▁A", "▁B"]), (ZEPHYR, ["A", "B"])])
def test_a_judge_reads_the_letters_that_its_model_would_write(
    template: str, letters: list[str], tmp_path: Path
) -> None:
    write(tmp_path, sentencepiece(), template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_chat_tokenizer(tmp_path)
    a, b = ids_of(tokenizer.tokenizer.get_vocab(), *letters)
    last = tokenizer.prompt(USER)[-1]
    judge = LanguageModelJudge(
        chain(tokenizer.vocab_size, {last: a}, b), tokenizer, "{prompt}{first}{second}"
    )
    assert judge([("a", "b", "c")])[0] > 0.99
    judge = LanguageModelJudge(
        chain(tokenizer.vocab_size, {last: b}, a), tokenizer, "{prompt}{first}{second}"
    )
    assert judge([("a", "b", "c")])[0] < 0.01


def test_an_exported_reward_model_carries_the_ends(tmp_path: Path) -> None:
    write(tmp_path / "start", byte_level(), CHATML, eos_token="<|endoftext|>")
    tokenizer = load_chat_tokenizer(tmp_path / "start")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=2)
    save_reward_model(RewardModel(Transformer(config)), tokenizer, tmp_path / "reward")
    assert load_tokenizer(tmp_path / "reward").end_ids == tokenizer.end_ids


def fine_tuning(directory: Path, tokenizer: Path, lines: list[Any], **more: Any) -> Prepared:
    """What `sft` makes ready of the lines, held-out ones being the same."""
    directory.mkdir(exist_ok=True)
    file = directory / "chats.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    config = SftConfig(
        tokenizer=str(tokenizer),
        model={"vocab_size": 400, "n_layers": 1, "d_model": 16, "n_heads": 2},
        training={"steps": 1, "batch_sequences": 1, "context_tokens": 64},
        data={"train": str(file), "held_out": str(file)},
        **more,
    )
    spec = SimpleNamespace(data=str(directory / "data"), workload="sft")
    return sft.prepare(cast(AttemptSpec, spec), config)


def learned(prepared: Prepared, tokenizer: ChatTokenizer) -> list[str]:
    """The text of each training sequence's answers."""
    sequences = Sequences.load(Path(prepared.path) / "train.safetensors")
    return [
        tokenizer.decode(ids[answers].tolist(), special=True)
        for ids, answers in (sequences.slice(number) for number in range(len(sequences)))
    ]


def test_fine_tuning_learns_the_answers_that_count(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "hello"}
    lines = [
        {"messages": [answer, *USER, answer]},
        {"messages": [*USER, answer | {"content": "3", "weight": 0}, *USER, answer]},
        {"prompt": [*USER, answer | {"content": "3"}, *USER], "completion": "hello"},
        {"prompt": "hi", "completion": " hello"},
    ]
    write(tmp_path / "1", byte_level(), CHATML, eos_token="<|endoftext|>")
    tokenizer = load_chat_tokenizer(tmp_path / "1")
    prepared = fine_tuning(tmp_path / "run", tmp_path / "1", lines)
    turn = "hello<|im_end|>"
    assert learned(prepared, tokenizer) == [turn + turn, turn, turn, " hello<|endoftext|>"]
    assert load_chat_tokenizer(prepared.tokenizer) == tokenizer
    write(tmp_path / "2", byte_level(), ZEPHYR, eos_token="<|endoftext|>")
    other = fine_tuning(tmp_path / "run", tmp_path / "2", lines)  # the same vocabulary, the same store
    assert learned(other, tokenizer)[1] == "hello<|endoftext|>"
    assert load_chat_tokenizer(other.tokenizer).template == ZEPHYR


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    write(
        tmp_path / "1", byte_level(), "{{ raise_exception('no') if messages | length > 2 }}", eos_token="<s>"
    )
    answer = {"role": "assistant", "content": "hello"}
    with pytest.raises(DataError, match=r"chats\.jsonl, example 1: the chat template refuses"):
        fine_tuning(tmp_path / "run", tmp_path / "1", [{"messages": [*USER, answer, *USER, answer]}])


def test_another_tokenizer_for_a_start_keeps_the_starts_ends(two_ends: Path, tmp_path: Path) -> None:
    (two_ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9]}))
    write(tmp_path, byte_level(), ZEPHYR, eos_token="<|endoftext|>")
    data = {"train": "some.jsonl"}
    config = SftConfig(
        start={"path": str(two_ends)}, tokenizer=str(tmp_path), data=data, training={"steps": 1}
    )
    assert open_tokenizer(config).end_ids == (0, 9)

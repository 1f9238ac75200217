"""Masks of answers equal transformers' own, by {% generation %} marks in templates of the shapes in use.

The marks stand around what the model has to write: from the end of the generation prompt through the end-of-turn token.
Each template is read with its marks (they are taken at their word) and without (answers are found).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from escala.contract.errors import DataError
from tests.numerics.small_tokenizers import byte_level, write
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer

OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
CHATML = (  # Qwen2's, with a default system prompt
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    + ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    + ALTERNATE
    + "{% if m['role'] == 'assistant' %}<start_of_turn>model\n"
    "{% generation %}{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}\n"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN3 = (  # thoughts are written after the last question alone, empty ones where the last answer has none
    "{% set ns = namespace(open=true, last=messages | length - 1) %}"
    "{% for m in messages[::-1] %}{% if ns.open and m['role'] == 'user' %}"
    "{% set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{% set thoughts = '' %}{% set text = m['content'] %}{% if '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (  # the whole ends with another token, unless an answer is asked for
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (  # the last answer ends otherwise than earlier ones, which end as the default system prompt does
    "<|im_start|>system<|start_header_id|>You are ChatGPT.<|im_end|>{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '<|start_header_id|>' + m['content'] }}"
    "{% if loop.last %}<|eot_id|>{% else %}<|im_end|>{% endif %}{% endgeneration %}"
    "{% else %}{{ '<|start_header_id|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "<|endoftext|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "zephyr": (ZEPHYR, "<|endoftext|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "harmony": (HARMONY, "<|eot_id|>"),
}
CONTENTS = [
    "You",  # the default system prompt begins with it
    "You are a helpful assistant.",
    "hello",
    "hi",
    "",
    " ",
    "\n",
    " lead",
    "trail \t\n",
    "Où? \U0001f98a\n\ntwo",
    "assistant\nhi",
    "<think>\nwhy\n</think>\n\nso",
]


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from turns such as "user: hi"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CONVERSATIONS = [
    said("assistant: You"),
    said("assistant: You", "user: hi", "assistant: hello"),
    said("assistant: ", "user: hi", "assistant: "),
    said("assistant: hi", "assistant: hi", "user: hi", "assistant: hi"),
    said("system: hi", "assistant: You", "system: hi", "user: You", "assistant: You"),
    said("user: hi", "assistant: hi"),
    said(
        "user: hi",
        "assistant: <think>\nwhy\n</think>\n\nso",
        "user: hi",
        "assistant: <think>\nwhy\n</think>\n\nso",
    ),
    said("user: hi", "assistant:  lead ", "user: hi", "assistant: \n"),
    said("system: You are a helpful assistant.", "user: x", "assistant: You are a helpful assistant."),
    said("user: hi", "assistant: Où? \U0001f98a", "user: hi"),
]


def random_conversation(draw: random.Random) -> list[dict[str, str]]:
    """One to five messages, of which one at least is the assistant's."""
    length = draw.randrange(1, 6)
    roles = [draw.choice(["user", "assistant", "assistant", "system"]) for _ in range(length)]
    if draw.random() < 0.4 or "assistant" not in roles:
        roles = ["user", "assistant", "user", "assistant", "user"][: max(2, length)]
    return [{"role": role, "content": draw.choice(CONTENTS)} for role in roles]


@pytest.fixture(scope="module", params=TEMPLATES)
def readers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, ChatTokenizer]]:
    """transformers' tokenizer, and ours with and without the marks."""
    template, end = TEMPLATES[request.param]
    unmarked = template.replace(OPEN, "").replace(CLOSE, "")
    root: Path = tmp_path_factory.mktemp(request.param)
    settings = {"bos_token": "<s>", "eos_token": end}
    for name, text in (("marked", template), ("unmarked", unmarked)):
        write(root / name, byte_level(), text, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(root / "marked")
    return theirs, {name: load_chat_tokenizer(root / name) for name in ("marked", "unmarked")}


def test_masks_equal_transformers(readers: tuple[Any, dict[str, ChatTokenizer]]) -> None:
    theirs, ours = readers
    draw, compared = random.Random(0), 0
    for messages in [*CONVERSATIONS, *(random_conversation(draw) for _ in range(80))]:
        try:
            expected = theirs.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # noqa: BLE001  (a template raises what it likes)
            for tokenizer in ours.values():
                with pytest.raises(DataError, match="template refuses"):
                    tokenizer.conversation(messages)
            continue
        for name, tokenizer in ours.items():
            ids, answers = tokenizer.conversation(messages)
            assert ids == expected["input_ids"], (name, messages)
            assert [int(answer) for answer in answers] == expected["assistant_masks"], (name, messages)
            compared += 1
    assert compared > 60  # Mistral and Gemma refuse what does not alternate


def test_an_answer_of_weight_0_is_left_out_of_the_mask(readers: tuple[Any, dict[str, ChatTokenizer]]) -> None:
    theirs, ours = readers
    messages = said("user: hi", "assistant: hello", "user: hi", "assistant: You")
    for tokenizer in ours.values():
        ids, answers = tokenizer.conversation(messages, untrained={1})
        learned = theirs.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
        assert "You" in learned
        assert "hello" not in learned


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (  # an empty answer has no turn
            "{% for m in messages %}{% if m['content'] %}"
            + CHATML.partition("{% for m in messages %}")[2].replace(
                "{% endfor %}", "{% endif %}{% endfor %}"
            ),
            said("user: hi", "assistant: ", "user: hi", "assistant: hi"),
            "message 2",
        ),
        (  # the generation prompt opens thoughts that no answer has
            CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
            said("user: hi", "assistant: hello"),
            "message 2",
        ),
        (  # earlier answers are shortened
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}"),
            said("user: hi", "assistant: hello", "user: hi", "assistant: hi"),
            "differently in a longer one",
        ),
        (  # roles that it does not know are left out
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"),
            said("user: hi", "tool: 21", "assistant: It is 21."),
            "does not write messages of the role 'tool'",
        ),
    ],
)
def test_what_is_not_found_is_refused(
    template: str, messages: list[dict[str, str]], reason: str, tmp_path: Path
) -> None:
    unmarked = template.replace(OPEN, "").replace(CLOSE, "")
    tokenizer = load_chat_tokenizer(write(tmp_path, byte_level(), unmarked, eos_token="<|im_end|>"))
    with pytest.raises(DataError, match=reason):
        tokenizer.conversation(messages)

"""Judges: both orders, rewards, a language model's A against B, and the preferences that a judge writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from escala.contract import handshake
from escala.contract.errors import DataError
from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, read_record, write_json
from escala.schema import ModelConfig
from escala.schema.judge import JudgeConfig
from escala.schema.rewards.judge import JudgeModelConfig
from tests.unit.small_chat import END, ByteChat
from workloads import judge as entry_point
from workloads.data.preferences import Preference, read_preferences
from workloads.judge import Responses, comparisons, merge, read_responses, totals
from workloads.model.compression.layers import decompress_model
from workloads.model.compression.stored import store_weights
from workloads.model.transformer import Transformer
from workloads.rewards.judge import Judge, read_references
from workloads.rewards.judge_models import JudgeQuestion, LanguageModelJudge, compare, prompt_key

QUESTION = "{prompt}|{first}|{second}?"


def longer_wins(questions: Sequence[JudgeQuestion], bias: float = 0.1) -> list[float]:
    """Prefers longer responses, and the first place by `bias`."""
    return [0.5 + bias + 0.05 * (len(first) - len(second)) for _, first, second in questions]


def language_model_judge(batch: int = 3) -> LanguageModelJudge:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=END + 1, n_layers=2, d_model=32, n_heads=2, max_context_tokens=64)
    return LanguageModelJudge(Transformer(config), ByteChat(), QUESTION, batch)


def test_both_orders_are_asked_so_the_place_cancels() -> None:
    asked: list[JudgeQuestion] = []

    def model(questions: Sequence[JudgeQuestion]) -> list[float]:
        asked.extend(questions)
        return longer_wins(questions)

    (verdict,) = compare(model, [("p", "abc", "a")])
    assert asked == [("p", "abc", "a"), ("p", "a", "abc")]
    assert verdict.win == pytest.approx(0.6)
    assert verdict.place_bias == pytest.approx(0.1)
    (swapped,) = compare(model, [("p", "a", "abc")])
    assert swapped.win == pytest.approx(1 - verdict.win)
    assert swapped.place_bias == pytest.approx(verdict.place_bias)


def test_the_reward_is_the_mean_win_against_the_others_of_the_prompt() -> None:
    chat = [{"role": "user", "content": "q"}]
    prompts = ["q", chat, "q", "q", chat]
    rewards = Judge(longer_wins).score(prompts, ["a", "ab", "aaa", "aa", "a"])
    assert rewards == pytest.approx([0.5 - 0.05 * 1.5, 0.55, 0.5 + 0.05 * 1.5, 0.5, 0.45])
    assert Judge(longer_wins).score(["q", "q"], ["same", "same"]) == [0.5, 0.5]


def test_a_lone_response_needs_a_reference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got one response to the prompt"):
        Judge(longer_wins).score(["p", "q", "q"], ["a", "b", "c"])
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "aaa"}))
    references = read_references(path)
    assert Judge(longer_wins, references).score(["p", "p"], ["a", "aaaa"]) == pytest.approx([0.4, 0.55])
    with pytest.raises(DataError, match="no reference response to the prompt"):
        Judge(longer_wins, references).score(["q", "q"], ["a", "b"])
    path.write_text("\n".join(json.dumps({"prompt": "p", "response": r}) for r in "aab"))
    with pytest.raises(DataError, match="line 3 is a second reference"):
        read_references(path)


@pytest.mark.parametrize("answers", [[1.5, 0.0], [float("nan"), 0.5], [0.5]])
def test_a_judge_must_answer_with_probabilities(answers: list[float]) -> None:
    with pytest.raises(DataError, match=r"no probability|gave 1 answers"):
        compare(lambda questions: answers, [("p", "a", "b")])


def test_a_language_model_judges_by_the_logits_of_a_and_b() -> None:
    judge = language_model_judge()
    questions: list[JudgeQuestion] = [("p", "x" * i, "yy") for i in range(7)]
    questions.append(([{"role": "user", "content": "hi"}], "a {b}", "c"))
    probabilities = judge(questions)
    for (prompt, first, second), found in zip(questions, probabilities, strict=True):
        shown = prompt if isinstance(prompt, str) else "user: hi"
        ids = [*f"u>{shown}|{first}|{second}?".encode(), END, ord(">")]
        logits_V = judge.model(torch.tensor([ids]))[0, -1].double()
        a, b = logits_V[ord("A")].exp(), logits_V[ord("B")].exp()
        assert found == pytest.approx((a / (a + b)).item(), abs=1e-6)
    assert len({round(p, 9) for p in probabilities}) == 8
    wins = [v.win for v in compare(judge, questions)]
    swapped = [v.win for v in compare(judge, [(p, b, a) for p, a, b in questions])]
    assert wins == pytest.approx([1 - win for win in swapped], abs=1e-6)
    with pytest.raises(DataError, match="more than the model's 64"):
        judge([("p", "x" * 60, "y")])


def test_a_tokenizer_without_the_letters_is_refused() -> None:
    class Pieces(ByteChat):
        def encode(self, text: str) -> list[int]:
            return [1, *super().encode(text)]

    with pytest.raises(DataError, match="no token for the letter A"):
        LanguageModelJudge(language_model_judge().model, Pieces(), QUESTION)


def test_responses_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b", "c"]}))
    assert read_responses(path) == [Responses("p", ["a", "b", "c"])]
    for bad, words in (
        ({"responses": ["a", "b"]}, "`prompt` must be"),
        ({"prompt": "p", "responses": ["a"]}, "two texts or more"),
        ({"prompt": "p", "responses": "ab"}, "two texts or more"),
        ({"prompt": "p", "responses": ["a", 2]}, r"`responses\[1\]` must be a text, but is int"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=f"line 1.*{words}"):
            read_responses(path)


def test_a_judges_preferences(tmp_path: Path) -> None:
    examples = [Responses("p", ["a", "aaaa", "a"]), Responses("q", ["bb", "b", "xx"])]
    found = [c for i, example in enumerate(examples) for c in comparisons(i, example, longer_wins)]
    assert [(c.first, c.second) for c in found] == [("a", "aaaa"), ("bb", "b"), ("bb", "xx"), ("b", "xx")]
    to = tmp_path / "new" / "preferences.jsonl"
    counts = totals(found, 0.0, to)
    assert counts == pytest.approx({"comparisons": 4, "preferences": 3, "place_bias": 0.1})
    assert list(read_preferences(to)) == [
        Preference("p", "aaaa", "a"),
        Preference("q", "bb", "b"),
        Preference("q", "xx", "b"),
    ]
    wins = [json.loads(line)["win_probability"] for line in to.read_text().splitlines()]
    assert wins == pytest.approx([0.65, 0.55, 0.55])
    assert totals(found, 0.2, to)["preferences"] == 1
    assert [p.prompt for p in read_preferences(to)] == ["p"]
    assert totals([], 0.0, to) == {"comparisons": 0, "preferences": 0, "place_bias": None}


def test_ranks_judge_every_prompt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": f"prompt {i}", "responses": ["a", "a" * (i + 2)]} for i in range(5)]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = JudgeConfig(
        responses=str(tmp_path / "responses.jsonl"), to=str(tmp_path / "out.jsonl"), judge={"model": "none"}
    )
    monkeypatch.setattr(entry_point, "load_judge_model", lambda config, device: longer_wins)
    for rank in range(2):
        entry_point.judge_part(config, rank, 2, str(tmp_path))
    found = merge([entry_point.part_path(str(tmp_path), rank) for rank in range(2)])
    assert [c.prompt for c in found] == [f"prompt {i}" for i in range(5)]
    assert [c.win for c in found] == pytest.approx([0.5 - 0.05 * (i + 1) for i in range(5)])


def test_prompt_keys_tell_chats_from_texts() -> None:
    chat = [{"role": "user", "content": "q"}]
    assert prompt_key(chat) == prompt_key([{"content": "q", "role": "user"}])
    assert len({prompt_key(chat), prompt_key("q"), prompt_key(prompt_key(chat))}) == 3


def attempt(tmp_path: Path, responses: str) -> AttemptFiles:
    """Run the entry point in this process; it must not reach Ray."""
    (tmp_path / "responses.jsonl").write_text(responses)
    config = {
        "responses": str(tmp_path / "responses.jsonl"),
        "to": str(tmp_path / "out.jsonl"),
        "judge": {"model": str(tmp_path / "none")},
    }
    spec = AttemptSpec(
        job_id="judge-1",
        attempt=1,
        name="judge",
        workload="judge",
        entry_point="workloads.judge",
        config=config,
        directory=str(tmp_path),
        checkpoints=str(tmp_path / "checkpoints"),
        data=str(tmp_path / "data"),
        tracking_uri=f"spool:{tmp_path / 'spool'}",
        experiment="tests",
        versions=handshake.versions(),
    )
    write_json(tmp_path / "attempt.json", spec)
    assert entry_point.main([str(tmp_path / "attempt.json")]) == DataError.exit_code
    return AttemptFiles(str(tmp_path))


def test_a_bad_line_ends_the_attempt_before_it_starts_workers(tmp_path: Path) -> None:
    outcome = read_record(Outcome, attempt(tmp_path, '{"prompt": "p", "responses": []}').outcome)
    assert outcome is not None
    assert outcome.kind == "user_error"
    assert "responses.jsonl, line 1: `responses` must be a list" in outcome.message
    assert outcome.record is not None
    assert outcome.record["workload"] == "judge"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_judge_in_codes_answers_as_its_dequantised_self(precision: str) -> None:
    judge = language_model_judge()
    questions = [("prompt", "first", "second"), ("prompt", "b", "a")]
    plain = judge(questions)
    section = JudgeModelConfig.model_validate({"model": "x", "precision": precision})
    store_weights(judge.model, section, judge.tokenizer)
    answers = judge(questions)
    judge.model = decompress_model(judge.model).eval()
    assert answers == pytest.approx(judge(questions), abs=1e-6)
    assert answers != plain

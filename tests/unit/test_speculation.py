"""Drafts, how many of them pay, and the engine that scores them: the same responses with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.engines import KINDS
from escala.schema.speculation import SpeculationConfig
from tests.eager import Eager
from workloads.data.tokenizer import TextTokenizer, train_tokenizer, wrap
from workloads.generation.engine import Engine
from workloads.generation.engines import make_engine
from workloads.generation.protocol import Output, Request, SamplingParams
from workloads.generation.scheduler import Sequence
from workloads.generation.speculation.drafter import NO_GUESS, Drafter
from workloads.generation.speculation.history import HistoryDrafter
from workloads.generation.speculation.model import ModelDrafter
from workloads.generation.speculation.ngram import NgramDrafter
from workloads.generation.speculation.pace import Acceptance, RequestRecord, StepCosts, best_count, best_depth
from workloads.generation.speculation.speculator import Speculator
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer

VOCAB = 300
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 32}


def model_of(seed: int = 0, **changes: Any) -> Transformer:
    """Sure of what it says: it repeats itself."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**SMALL, "max_context_tokens": 64, **changes}))
    for name, weight in model.named_parameters():
        if "embedding" not in name and "norm" not in name:
            weight.data *= 2
    model.embedding.weight.data *= 3
    return model


def sequence_of(prompt: list[int], response: list[int] | None = None) -> Sequence:
    return Sequence(Request("a", tuple(prompt), SamplingParams()), None, [], [*prompt, *(response or [])])


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return wrap(train_tokenizer(["the cat sat on the mat and the dog ran after the cat"] * 5, VOCAB), "test")


def test_an_ngram_s_draft_is_what_followed_it_and_goes_on_in_itself() -> None:
    drafter, sequence = NgramDrafter(), sequence_of([5, 6, 1, 2, 3, 4, 9, 8, 1, 2])
    drafter.begin(sequence)
    ((guess),) = drafter.guesses([(sequence, 4)])
    assert guess.tokens == (3, 4, 9, 8)
    assert guess.grades == (
        2,
        3,
        4,
        5,
    )  # two places agree in two tokens, and in one more with each that is accepted
    sequence.tokens += [3, 7, 7, 7]
    (guess,) = drafter.guesses([(sequence, 5)])
    assert guess.tokens == (7,) * 5
    sequence.tokens += [250, 251]
    assert drafter.guesses([(sequence, 5)]) == [NO_GUESS]
    drafter.end(sequence)
    drafter.end(sequence)


def test_history_is_of_one_prompt_counts_what_runs_and_is_bounded() -> None:
    drafter = HistoryDrafter(responses=2, tokens=12)

    def ended(prompt: list[int], response: list[int]) -> None:
        sequence = sequence_of(prompt, response)
        drafter.begin(sequence)
        drafter.end(sequence)

    def guess(prompt: list[int], response: list[int], most: int = 3) -> tuple[int, ...]:
        sequence = sequence_of(prompt, response)
        drafter.begin(sequence)
        tokens = drafter.guesses([(sequence, most)])[0].tokens
        drafter.end(sequence_of([], []))  # one that never began
        return tokens

    ended([1, 2], [3, 4, 5, 6])
    assert guess([1, 2], [3]) == (4, 5, 6)
    assert guess([1, 2], []) == (3, 4, 5)  # the first token is drafted, too
    assert guess([1, 3], [3, 4]) == ()
    running = sequence_of([9, 9], [4, 4, 8])
    drafter.begin(running)
    drafter.guesses([(running, 1)])
    assert guess([9, 9], [4, 4]) == (8,)  # of a group's member that has not ended
    for response in ([3, 4, 7, 7], [3, 4, 7, 7]):
        ended([1, 2], response)
    assert drafter._total == 8  # of three the newest two
    ended([2, 2], [1] * 8)
    assert drafter._total == 8  # the prompt that was asked for longest ago went
    assert len(drafter._kept) == 1


def test_as_many_tokens_are_scored_as_pay() -> None:
    flat, steep = StepCosts(), StepCosts()
    for rows in range(1, 40):
        flat.add(rows, 1.0 + 0.001 * rows)
        steep.add(rows, 0.3 + rows)
    chances = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert best_count(chances, 4, flat) == 5
    assert best_count(chances, 4, steep) == 0
    assert best_count([1.0] * 5, 4, steep) == 5  # a row costs less than its share of the step
    assert best_depth(0.9, 2, flat, 0.01, 8) == 8
    assert best_depth(0.9, 2, flat, 0.9, 8) == best_depth(0.5, 2, steep, 0.0, 8) == 0


def test_costs_are_tried_a_little_beyond_what_is_known_and_forgotten() -> None:
    costs = StepCosts()
    assert not costs.knows(1)
    costs.add(1, 1.0)
    assert costs.knows(1)
    assert best_count([0.9] * 8, 1, costs) == 3
    costs.add(4, 1.0)
    assert costs.seconds(2) == costs.seconds(3) == 1.0
    costs.add(8, 2.0)
    assert costs.seconds(6) == pytest.approx(1.5)
    assert costs.seconds(12) == pytest.approx(3.0)
    costs.add(8, 100.0)  # disturbed
    assert costs.seconds(8) == pytest.approx(4.0)
    for _ in range(600):
        costs.add(1, 1.0)
    assert costs.knows(1)
    assert not costs.knows(8)


def test_acceptance_is_measured_by_grade_and_by_request() -> None:
    acceptance, record = Acceptance(), RequestRecord()
    assert acceptance.rate(3) == 0.5
    for number in range(1000):
        acceptance.tested(3, number % 4 > 0)
        record.tested(0.75, number % 2 > 0)
    assert acceptance.rate(3) == pytest.approx(0.75, abs=0.03)
    assert record.factor == pytest.approx(0.67, abs=0.1)


class Slow(Drafter):
    """Always sure, never right, and slow."""

    is_costly = True
    asked = 0

    def begin(self, sequence: Sequence) -> None:
        pass

    end = begin

    def guesses(self, sequences: Any) -> Any:
        self.asked += 1
        return [NO_GUESS for _ in sequences]


def test_a_costly_draft_is_made_once_in_a_while_where_it_does_not_pay() -> None:
    drafter, sequence = Slow(), sequence_of([1, 2], [3])
    speculator = Speculator(drafter, 4)
    speculator.begin(sequence)
    for _ in range(640):
        speculator.drafts([sequence])
        speculator.measured(1, 1.0)
        speculator._acceptance.tested(-1, False)
    assert drafter.asked <= 20


PARAMS = [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=30, temperature=0.7, seed=3),
    SamplingParams(max_tokens=29, temperature=0.5, seed=4, repetition_penalty=1.1, top_p=0.9),
    SamplingParams(max_tokens=1, seed=5),
    SamplingParams(max_tokens=25, temperature=0, stop=("cat",), ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=0.3, seed=7, stop_token_ids=tuple(range(0, VOCAB, 7))),
]
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9] * 17, [5, 6, 7], [11, 12], [40, 41, 42] * 3, [33, 34]]


def whole(outputs: dict[str, list[Output]]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (
            [t for o in some for t in o.token_ids],
            [p for o in some for p in o.logprobs],
            "".join(o.text for o in some),
            some[-1].finish_reason,
        )
        for name, some in outputs.items()
    }


def run(engine: Engine) -> dict[str, list[Output]]:
    """All requests but the last, which is cancelled after three steps, streamed."""
    for number, (prompt, params) in enumerate(zip([*PROMPTS, [5, 6]], [*PARAMS, PARAMS[0]], strict=True)):
        engine.add(Request(str(number), tuple(prompt), params))
    found: dict[str, list[Output]] = {}
    for step in range(10_000):
        if not engine.has_work:
            break
        if step == 3:
            engine.cancel(str(len(PARAMS)))
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


@pytest.mark.parametrize("draft", ["ngram", "history", "itself"])
def test_responses_are_the_same_with_and_without_drafts(draft: str, tokenizer: TextTokenizer) -> None:
    """Streamed, stopped by strings and tokens, penalised, cancelled; several tokens in one output."""
    plain = run(Engine(model_of(), tokenizer, block_tokens=8))
    cancelled = str(len(PARAMS))
    drafter = {
        "ngram": NgramDrafter,
        "history": HistoryDrafter,
        "itself": lambda: ModelDrafter(model_of(), 3),
    }
    engine = Engine(
        model_of(), tokenizer, block_tokens=8, max_running=3, speculation=Eager(drafter[draft](), 6)
    )
    for _ in range(2):
        found = run(engine)
        wanted, got = whole(plain), whole(found)
        assert wanted.pop(cancelled)[3] == got.pop(cancelled)[3] == "cancelled"
        assert got == wanted
    stats = engine.stats()
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert any(len(o.token_ids) > 1 for some in found.values() for o in some)
    assert stats.free_blocks == stats.total_blocks
    assert stats.generated_tokens == sum(len(o.token_ids) for some in found.values() for o in some) * 2
    assert not engine._speculation._records  # type: ignore[union-attr]


def test_what_is_measured_decides_and_the_response_stays() -> None:
    params = SamplingParams(max_tokens=47, temperature=0)
    wanted = Engine(model_of(), None, block_tokens=8).generate(PROMPTS, params)
    engine = Engine(model_of(), None, block_tokens=8, speculation=Speculator(NgramDrafter(), 8))
    found = engine.generate(PROMPTS, params)
    assert found == wanted
    assert sum(c.drafted for c in found) == engine.stats().drafted_tokens
    assert sum(c.accepted for c in found) == engine.stats().accepted_tokens
    assert 0 < sum(c.cpu_seconds for c in found) <= engine.stats().cpu_seconds


def test_new_weights_meet_no_old_key_and_history_stays() -> None:
    engine = Engine(model_of(), None, block_tokens=8, speculation=Eager(HistoryDrafter(), 6))
    params = SamplingParams(max_tokens=20, temperature=0)
    engine.generate(PROMPTS, params)
    engine.load_weights(model_of(1).state_dict(), 1)
    found = engine.generate(PROMPTS, params)
    assert {c.weights_version for c in found} == {1}
    wanted = Engine(model_of(1), None, block_tokens=8).generate(PROMPTS, params)
    assert [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in wanted]
    assert engine.stats().drafted_tokens > 0


def test_a_section_is_read_and_a_path_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SpeculationConfig(draft="ngram").draft == "ngram"
    read = SpeculationConfig(draft="small")
    assert read.draft == str(tmp_path / "small")
    assert SpeculationConfig(**read.model_dump()) == read
    for wrong in ({"draft": "ngram", "tokens": 0}, {"draft": "ngram", "tokens": 65}, {"tokens": 2}):
        with pytest.raises(ValidationError):
            SpeculationConfig(**wrong)
    section = KINDS.read({"speculation": {"draft": "history", "tokens": 3}})
    engine = make_engine(section, model_of(), None)
    assert engine._speculation._tokens == 3  # type: ignore[attr-defined]


def test_a_draft_model_of_other_tokens_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    other = wrap(train_tokenizer(["something else altogether, of other words"] * 5, 280), "other")
    for name, own, size in (("same", tokenizer, VOCAB), ("other", other, VOCAB), ("wide", tokenizer, 320)):
        save_pretrained(model_of(vocab_size=size), tmp_path / name)
        own.tokenizer.save(str(tmp_path / name / "tokenizer.json"))

    def engine(name: str) -> Any:
        section = KINDS.read({"speculation": {"draft": str(tmp_path / name)}})
        return make_engine(section, model_of(), tokenizer)

    params = SamplingParams(max_tokens=20, temperature=0)
    assert engine("same").generate(PROMPTS, params) == Engine(model_of(), tokenizer).generate(PROMPTS, params)
    with pytest.raises(SpecError, match="another tokenizer"):
        engine("other")
    with pytest.raises(SpecError, match="vocabulary of 320 tokens, the model that is served one of 300"):
        engine("wide")


def test_a_mixture_that_drops_tokens_is_refused() -> None:
    moe = {"experts": 4, "chosen": 2, "evaluation_capacity_factor": 1.0}
    model = model_of(moe=moe)
    with pytest.raises(SpecError, match="can't serve a mixture that drops tokens"):
        Engine(model, None, speculation=Speculator(NgramDrafter(), 4))
    dropless = model_of(moe={**moe, "evaluation_capacity_factor": None})
    engine = Engine(dropless, None, speculation=Speculator(NgramDrafter(), 4))
    with pytest.raises(SpecError, match="can't serve a mixture that drops tokens"):
        engine.set_capacity_factor(1.0, 1)
    engine.set_capacity_factor(None, 1)

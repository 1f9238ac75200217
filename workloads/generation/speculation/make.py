"""The speculator of a section `speculation`."""

from __future__ import annotations

from pathlib import Path

from escala.contract.errors import SpecError
from escala.schema.speculation import HISTORY, NGRAM, SpeculationConfig
from workloads.generation.protocol import EngineTokenizer
from workloads.generation.speculation.drafter import Drafter
from workloads.generation.speculation.history import HistoryDrafter
from workloads.generation.speculation.model import ModelDrafter
from workloads.generation.speculation.ngram import NgramDrafter
from workloads.generation.speculation.speculator import Speculator
from workloads.model.transformer import Transformer

WORDS: dict[str, type[NgramDrafter] | type[HistoryDrafter]] = {NGRAM: NgramDrafter, HISTORY: HistoryDrafter}


def make_speculator(
    section: SpeculationConfig, model: Transformer, tokenizer: EngineTokenizer | None, max_running: int
) -> Speculator:
    """What drafts for an engine that serves `model`.

    Raises SpecError for a model whose tokens are not those of `model`, and what `load_model` and `load_tokenizer`
    raise.
    """
    kind = WORDS.get(section.draft)
    drafter: Drafter = _model_drafter(section, model, tokenizer, max_running) if kind is None else kind()
    return Speculator(drafter, section.tokens)


def _model_drafter(
    section: SpeculationConfig, model: Transformer, tokenizer: EngineTokenizer | None, max_running: int
) -> ModelDrafter:
    # Here, since it needs the files' libraries, which an engine does without.
    from workloads.data.tokenizer import tokenizer_fingerprint
    from workloads.model.start import load_model, load_tokenizer

    path = Path(section.draft)
    if tokenizer is not None and load_tokenizer(path).fingerprint != tokenizer_fingerprint(
        tokenizer.tokenizer
    ):
        raise SpecError(
            f"The draft model at {path} has another tokenizer than the model that is served.",
            "Draft with a model that was trained with the same tokenizer, or set speculation.draft to ngram or "
            "history.",
        )
    draft, weight = load_model(path), model.embedding.weight
    own, wanted = draft.config.vocab_size, model.config.vocab_size
    if own != wanted:
        raise SpecError(
            f"The draft model at {path} has a vocabulary of {own} tokens, the model that is served one of {wanted}.",
            "Draft with a model of the same vocabulary, or set speculation.draft to ngram or history.",
        )
    return ModelDrafter(draft.to(weight.device, weight.dtype), max_running)

"""The unit that a column's header states: `params (B)`, `tokens [M]`, `N (1e9)`, `Tokens (billions)`, `C (PFLOPs)`."""

from __future__ import annotations

import re

from escala.contract.errors import LawError

UNIT = re.compile(r"\s*[(\[]([^()\[\]]+)[)\]]\s*$|\s+in\s+(\w+)\s*$", re.IGNORECASE)
POWER = re.compile(r"[x×*]?\s*(?:1e|10\^|10\*\*)\+?([0-9]{1,2})", re.IGNORECASE)
COUNTS = {
    "k": 1e3, "thousand": 1e3, "m": 1e6, "mln": 1e6, "mio": 1e6, "million": 1e6,
    "b": 1e9, "bn": 1e9, "g": 1e9, "billion": 1e9, "t": 1e12, "trillion": 1e12,
}  # fmt: skip
PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
NO_LOSS = re.compile(r"ppl|perplexity|bits?\b|bpb|bpc|%", re.IGNORECASE)
LARGEST_COUNT = 1e15  # parameters or tokens: more than anybody has; the cells are plain counts already


def without_unit(header: str) -> str:
    """The header's name."""
    return UNIT.sub("", header).strip()


def factor_of(header: str, quantity: str) -> float | None:
    """What the cells under `header` are multiplied by; None where it states no scale.

    Raises LawError for a loss that is not in nats.
    """
    found = UNIT.search(header)
    if found is None:
        return None
    text = (found[1] or found[2]).strip()
    if quantity == "loss_nats":
        if NO_LOSS.search(text):
            raise LawError(f"{header} is not in nats.", "Convert it: nats = ln(perplexity) = bits x 0.6931.")
        return None
    power = POWER.fullmatch(text)
    if power:
        return float(10 ** int(power[1]))
    word = text.lower()
    if quantity == "compute_flops":
        prefix = re.fullmatch(r"([kmgtpez])-?flops?", word)
        return (
            PREFIXES[prefix[1]]
            if prefix
            else 8.64e19
            if re.fullmatch(r"pf(lops?)?(/s)?-days?", word)
            else None
        )
    if quantity == "energy_joules":
        prefix = re.fullmatch(r"([kmgt])j", word)
        return PREFIXES[prefix[1]] if prefix else {"kwh": 3.6e6, "mwh": 3.6e9}.get(word)
    word = word.removesuffix("tokens").removesuffix("parameters").removesuffix("params").strip()
    return COUNTS.get(word, COUNTS.get(word.removesuffix("s")))

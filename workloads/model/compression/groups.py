"""Which matrices share a width, and the widths that each may have (docs/theory E.6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from escala.contract.errors import SpecError
from escala.schema.compress import MODEL_BITS, OUTPUT_BITS, CompressConfig
from escala.schema.compression import MatrixChoice, is_kept
from workloads.model.compression.layers import UNEMBEDDING

TOGETHER = {
    "query": "query+key",
    "key": "query+key",
    "value": "value+output",
    "output": "value+output",
    "gate": "gate+up",
    "up": "gate+up",
}
"""Matrices of a block that are alike in what fewer bits cost; any other is a group of its own."""
WIDE_GROUP = 128


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices that get one width.

    Args:
        layer: of the block; None: the output product.
    """

    name: str
    layer: int | None
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A way to store a matrix.

    Args:
        bits: of a code; 16: bf16.
        wide: below 8 bits, groups of 128 inputs in place of 32, or of all where 128 do not divide them.
        rank_share: of the full rank: factors instead.
    """

    bits: int = 16
    wide: bool = False
    rank_share: float | None = None

    @property
    def label(self) -> str:
        """In tables: 4, 4 wide, rank 0.125."""
        if self.rank_share is not None:
            return f"rank {self.rank_share:g}"
        return f"{self.bits}{' wide' if self.wide else ''}"

    def is_served(self, group: MatrixGroup) -> bool:
        """Whether an assignment may choose it."""
        if group.layer is None:
            return self.rank_share is None and self.bits in OUTPUT_BITS
        return self.rank_share is not None or self.bits in MODEL_BITS

    def choice(self, shape: tuple[int, int], config: CompressConfig) -> MatrixChoice:
        """How a matrix (O, I) is stored so."""
        if self.rank_share is not None:
            return MatrixChoice(rank=max(1, round(self.rank_share * min(shape))))
        plain: dict[str, object] = {"bits": self.bits}
        if self.bits == 8:
            plain["group"] = config.group
        elif self.bits < 8:
            wide = WIDE_GROUP if shape[1] % WIDE_GROUP == 0 else None
            plain |= {"group": wide if self.wide else config.small_group, "method": config.method}
        return MatrixChoice.model_validate(plain)


def candidates(config: CompressConfig) -> list[Candidate]:
    """Every way that is measured; 4, 8 and 16 bits always are."""
    widths = sorted({*config.bits, *MODEL_BITS})
    wide = [Candidate(4, wide=True)] if config.group is None else []
    return [*map(Candidate, widths), *wide, *(Candidate(rank_share=share) for share in config.rank_shares)]


def groups(names: Iterable[str], keep: Iterable[str] = ()) -> list[MatrixGroup]:
    """The groups of a model's matrices, in the model's order; those that match a pattern of `keep` are in none.

    Raises SpecError where some matrices of a mixture's experts match and others do not: they are stored alike.
    """
    every, patterns, found = list(names), list(keep), dict[tuple[int | None, str], list[str]]()
    kept = [name for name in every if is_kept(name, patterns)]
    whole = {_mixture(name) for name in kept} - {None}
    for name in every:
        if name in kept:
            continue
        if _mixture(name) in whole:
            raise SpecError(
                f"{name} is to be stored smaller, and other experts' matrices of its mixture to stay as they are.",
                "Keep all of a mixture's experts, or none: blocks.0.feed_forward.experts.*.",
            )
        found.setdefault(_place(name), []).append(name)
    return [MatrixGroup(name, layer, tuple(members)) for (layer, name), members in found.items()]


def _mixture(name: str) -> str | None:
    """The experts that a matrix is one of; None: of none."""
    return name.rsplit(".", 2)[0] if name.rpartition(".")[2].isdecimal() else None


def _place(name: str) -> tuple[int | None, str]:
    """(layer, name of the group) of a matrix: of blocks.3.feed_forward.experts.up.5, 3 and
    blocks.3.feed_forward.experts.gate+up.
    """
    if name == UNEMBEDDING:
        return None, name
    parts = name.split(".")
    if parts[-1].isdecimal():
        parts.pop()
    return int(parts[1]), ".".join([*parts[:-1], TOGETHER.get(parts[-1], parts[-1])])

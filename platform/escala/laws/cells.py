"""What a cell of a table says: a number, nothing, a word, or something that only looks like a number.

A cell such as `7B`, `45 %`, `1.234,5` or `0x1F` is an error that names its place and the fix: taken as it stands, or
left out, it would make a law of other numbers than the table's author meant. A word (`diverged`) refuses its row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from escala.contract.errors import LawError

NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
WHOLE = re.compile(r"[-+]?[0-9]{1,15}")  # exact in a float64
INFINITE = re.compile(r"([-+]?)inf(inity)?", re.IGNORECASE)
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "--", "?"})
BOOLEANS = frozenset({"true", "false", "yes", "no"})
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")
PROVEN = re.compile(r"[-+]?[1-9][0-9]{0,2}((,[0-9]{3}){2,}(\.[0-9]+)?|,[0-9]{3}\.[0-9]+)")
SUFFIX = re.compile(r"([0-9.]+)\s*([kKmMbBgGtT])")
FACTORS = {"k": "e3", "m": "e6", "b": "e9", "g": "e9", "t": "e12"}

# (separator of thousands, decimal mark); a column is read so if all of it is, and one cell proves it
STYLES = {
    "spaces between thousands": ("[ \u00a0\u202f]", r"\."),
    "apostrophes between thousands": ("['\u2019]", r"\."),
    "underscores between thousands": ("_", r"\."),
    "spaces between thousands, decimal commas": ("[ \u00a0\u202f]", ","),
    "points between thousands, decimal commas": (r"\.", ","),
}
DECIMAL_COMMAS = "decimal commas"
COMMA = re.compile(r"[-+]?([0-9]+)(?:,([0-9]+))?([eE][-+]?[0-9]+)?")
SUFFIXES = "suffixes k, M, B, T"

Where = Callable[[int], str]  # the place of the i-th cell, in words


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing."""
    if isinstance(cell, str):
        return cell.strip().lower() in MISSING
    if isinstance(cell, float):
        return math.isnan(cell)
    return cell is None or type(cell).__name__ in (
        "NAType",
        "NaTType",
    )  # of pandas, which is not imported for it


def to_float(cell: Any) -> float | None:
    """The number that a cell says, NaN where it says nothing, None where it says something else."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, str):
        text = cell.strip()
        if NUMBER.fullmatch(text):
            return float(text)
        sign = INFINITE.fullmatch(text)
        if sign:
            return -math.inf if sign[1] == "-" else math.inf
        return math.nan if text.lower() in MISSING else None
    if cell is None:
        return math.nan
    try:
        return float(cell)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
    except (TypeError, ValueError):
        return None


def style(cells: Sequence[Any]) -> str | None:
    """How a column's numbers are written where all of it is in one style and a cell proves it; None: plainly, or
    not clear.
    """
    texts = [cell.strip() for cell in cells if not is_missing(cell) and isinstance(cell, str)]
    if len(texts) < sum(not is_missing(cell) for cell in cells) or not texts:
        return None
    if all(to_float(text) is not None for text in texts):
        return None
    if all(SUFFIX.fullmatch(text) and NUMBER.fullmatch(SUFFIX.fullmatch(text)[1]) for text in texts):  # type: ignore[index]
        return SUFFIXES
    if all(COMMA.fullmatch(text) for text in texts):
        return DECIMAL_COMMAS if any(_proves_a_decimal(text) for text in texts) else None
    for name, (mark, decimal) in STYLES.items():
        plain = rf"[-+]?[0-9]{{1,3}}({decimal}[0-9]+)?"
        grouped = rf"[-+]?[1-9][0-9]{{0,2}}({mark}[0-9]{{3}})+({decimal}[0-9]+)?"
        found = [re.fullmatch(grouped, text) for text in texts]
        proof = [m for m in found if m and (decimal == r"\." or mark != r"\." or m[2] or m[0].count(".") > 1)]
        with_comma = decimal == r"\." or any("," in text for text in texts) or mark == r"\."
        if (
            proof
            and with_comma
            and all(m or re.fullmatch(plain, t) for m, t in zip(found, texts, strict=True))
        ):
            return name
    return None


def _proves_a_decimal(text: str) -> bool:
    """Whether its comma separates no thousands: not three digits after it, or more than three or a 0 before it."""
    found = COMMA.fullmatch(text)
    if found is None or found[2] is None:
        return False
    return len(found[2]) != 3 or len(found[1]) > 3 or found[1].startswith("0")


def in_style(cell: Any, name: str) -> float:
    """The number that a cell of a column in the style `name` says."""
    if is_missing(cell):
        return math.nan
    text = str(cell).strip()
    if name == SUFFIXES:
        return float(text[:-1].strip() + FACTORS[text[-1].lower()])
    if name != DECIMAL_COMMAS:
        text = re.sub(STYLES[name][0], "", text)
    return float(text.replace(",", "."))


def quantities(cells: Sequence[Any], where: Where) -> list[Any]:
    """A column of numbers: float or int, NaN for nothing; a word stays as it is (its row is refused later).

    Thousands separators are read where the column proves that its commas are such (1,234,567 or 1,234.5).
    Raises LawError for a cell that looks like a number and is none, with its place and the fix.
    """
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    separated = any(PROVEN.fullmatch(text) for text in texts)
    if texts and all(WHOLE.fullmatch(text) for text in texts) and len(texts) == len(cells):
        return [int(text) for text in texts]
    return [_quantity(cell, separated, where, i) for i, cell in enumerate(cells)]


def _quantity(cell: Any, separated: bool, where: Where, i: int) -> Any:
    if separated and isinstance(cell, str) and THOUSANDS.fullmatch(cell.strip()):
        return float(cell.replace(",", ""))
    value = to_float(cell)
    if value is not None:
        return cell if isinstance(cell, int) and math.isfinite(value) else value
    problem = _problem(cell)
    if problem is None:
        return cell
    what, fix = problem
    raise LawError(f"{where(i)}: {cell!r} {what}.", fix)


def _problem(cell: Any) -> tuple[str, str] | None:
    """(what is wrong, the fix) of a cell that looks like a number; None for a word."""
    if isinstance(cell, bool) or (isinstance(cell, str) and cell.strip().lower() in BOOLEANS):
        return "is a boolean, not a number", "Write the number, or leave the cell empty."
    if not isinstance(cell, str):
        return f"is a {type(cell).__name__}, not a number", "A cell holds one value: a number or null."
    text = cell.strip()
    if not re.match(r"[-+$€£~<>≈]?\s*\.?[0-9]", text):
        return None
    if re.match(r"[-+]?0[xX]", text):
        return "is hexadecimal", "Write it in decimal digits."
    if "," in text:
        return (
            "has a comma, which may separate thousands or decimals",
            "Write digits without separators and a decimal point: 1234.5, not 1,234.5 or 1.234,5.",
        )
    if text.endswith("%"):
        return "is a percentage", "Write the number that is meant, without the sign."
    suffix = SUFFIX.fullmatch(text)
    if suffix:
        written = f"{suffix[1]}{FACTORS[suffix[2].lower()]}"
        return f"has the unit {suffix[2]}", f"Write plain numbers throughout the column, e.g. {written}."
    return (
        "is not a plain number",
        "Write digits with a decimal point or an exponent (2.5e9), no separators and no unit.",
    )


def plain(cells: Sequence[Any]) -> list[Any]:
    """A column of which nothing is known: numbers where every cell is a number or empty, else the texts."""
    values = [to_float(cell) for cell in cells]
    if any(value is None for value in values) or all(is_missing(cell) for cell in cells):
        return texts(cells)
    if all(
        isinstance(cell, int) or (isinstance(cell, str) and WHOLE.fullmatch(cell.strip())) for cell in cells
    ):
        return [int(cell) for cell in cells]
    return values


def texts(cells: Sequence[Any]) -> list[Any]:
    """A column of names: as written, None where a cell is empty."""
    return [None if cell is None or cell == "" else cell for cell in cells]

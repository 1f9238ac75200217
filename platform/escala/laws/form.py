"""What a form of a law is: its terms, and what follows from them. Each form stands in its own file, in `forms/`.

Every form is L = L_inf + sum over terms of coefficient * x^-exponent (docs/theory D.1, D.3). The mathematics of a fit
is in powers.py, that of the optimum in optimum.py. Letters: B replicates or starts, P parameters (first the 1 + K
coefficients, then the exponents). No numpy here: the command line lists the forms without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from escala.contract.errors import LawError
from escala.laws.inputs import N_ACTIVE, N_TOTAL, SIZE, SIZES, TOKENS, Input
from escala.laws.optimum import Optimum, TwoTerms, Value, best_split, check_budget

if TYPE_CHECKING:
    from escala.laws.optimum import Floats

EXPONENT_BOUNDS = (1e-6, 2.0)  # the open interval (0, 2); at 0 a term is a constant, which L_inf already is
FINE = (0.03, 0.08, 0.15, 0.22, 0.3, 0.38, 0.48, 0.6, 0.8, 1.1, 1.5, 1.9)  # start values of exponents
COARSE = (0.04, 0.14, 0.26, 0.38, 0.55, 0.85, 1.4)  # of forms with three exponents or more
FLOOR = "L_inf"
RATIO = "n_total_over_active"


@dataclass(frozen=True)
class Mix:
    """The size of a mixture of experts: N_eff = N_total^rho N_active^(1-rho); `parameter` is rho's name."""

    parameter: str
    over: Input = N_TOTAL
    bounds: tuple[float, float] = (0.0, 1.0)
    starts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def ratio(self, held: Mapping[str, float | None]) -> float:
        """N_total/N_active as it is asked for. Raises LawError for none, and for one that is impossible."""
        ratio = held.get(RATIO)
        if ratio is None:
            raise LawError(
                "Without a bound on N_total the optimum of a mixture of experts runs to infinity (docs/theory D.3).",
                f"Give {RATIO}, e.g. 8 (public practice is 8 to 64).",
            )
        if not (math.isfinite(ratio) and ratio >= 1):
            raise LawError(
                f"N_total/N_active cannot be {ratio}: experts add to N_total.", "Give a ratio >= 1."
            )
        return ratio


@dataclass(frozen=True)
class Join:
    """All terms joined in a power mean instead of a sum: (sum over terms of (c x^-e)^(1/gamma))^gamma; `parameter` is
    gamma's name. Below 1 the smaller term counts for less than it would alone.
    """

    parameter: str
    bounds: tuple[float, float] = (0.1, 2.0)
    starts: tuple[float, ...] = (1.0, 0.6, 0.35)


@dataclass(frozen=True)
class Term:
    """coefficient * x^-exponent, where log x = log input + rho * log ratio (rho and the ratio only with a mix)."""

    coefficient: str
    exponent: str
    input: Input
    mix: Mix | None = None

    @property
    def column(self) -> str:
        """The input's name."""
        return self.input.name

    @property
    def not_identified(self) -> str:
        """What a finding says where the input was not varied."""
        return f"{self.coefficient} and {self.exponent} are not identified"


@dataclass(frozen=True)
class Derived:
    """An input that follows from others where a table or a question has none."""

    input: Input
    sources: tuple[str, ...]
    compute: Callable[[Mapping[str, Any]], Any]  # of the sources, numbers or arrays
    note: str  # for a law's findings


@dataclass(frozen=True)
class Form:
    """A functional form. The input "size" stands for the N that the law is fitted on.

    `no_split`: why a budget has no best split of N and D under this form, and what to do; None: it has one, in closed
    form. `starts`: the exponents that a fit begins from. At most the first term has a mix, and not in a form with a
    `join`.
    """

    name: str
    formula: str
    terms: tuple[Term, ...]
    starts: tuple[float, ...] = COARSE
    derived: tuple[Derived, ...] = ()
    no_split: tuple[str, str] | None = None
    join: Join | None = None

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """L_inf and one coefficient per term."""
        return (FLOOR, *(term.coefficient for term in self.terms))

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        """One exponent per term, then the parameter of the mix or the join where the form has one."""
        last = () if self.shared is None else (self.shared.parameter,)
        return (*(term.exponent for term in self.terms), *last)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the internal vector."""
        return self.coefficients + self.exponents

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """What a point must carry besides its loss."""
        found = dict[Input, None]()
        for term in self.terms:
            found |= dict.fromkeys((term.input,) if term.mix is None else (term.input, term.mix.over))
        return tuple(found)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(each.name for each in self.inputs)

    def needs(self, size: str) -> tuple[str, ...]:
        """Names of the inputs of a law that is fitted on `size`."""
        return tuple(size if each is SIZE else each.name for each in self.inputs)

    @cached_property
    def mix(self) -> Mix | None:
        """How N_total counts; None for a form of one N."""
        return self.terms[0].mix

    @property
    def shared(self) -> Mix | Join | None:
        """What the last parameter belongs to, where it is no term's own."""
        return self.mix or self.join

    @property
    def mixed(self) -> bool:
        """Whether the form has N_eff = N_total^rho N_active^(1-rho)."""
        return self.mix is not None

    def bounds(self) -> tuple[list[float], list[float]]:
        """Lower and upper bounds, in the order of `names`."""
        k, last = len(self.coefficients), self.shared
        low = [0.0] * k + [EXPONENT_BOUNDS[0]] * len(self.terms) + ([last.bounds[0]] if last else [])
        high = [math.inf] * k + [EXPONENT_BOUNDS[1]] * len(self.terms) + ([last.bounds[1]] if last else [])
        return low, high

    def starts_of(self, name: str) -> tuple[float, ...]:
        """Values of an exponent, or of the mix's or the join's parameter, that a fit begins from."""
        last = self.shared
        return last.starts if last is not None and name == last.parameter else self.starts

    def term_of(self, column: str) -> Term | None:
        """The term of an input; None where the form does not read it."""
        return next((term for term in self.terms if term.column == column), None)

    @cached_property
    def size_term(self) -> Term | None:
        """The term of N; None for a form without N."""
        return next((t for t in self.terms if t.input is SIZE or t.column in SIZES), None)

    @cached_property
    def token_term(self) -> Term | None:
        """The term of D; None for a form without D."""
        return self.term_of(TOKENS.name)

    def size_input(self, size: str) -> str | None:
        """The column that is N of the compute 6 N D, for a law that is fitted on `size`; None for a form without N."""
        term = self.size_term
        return None if term is None else size if term.input is SIZE else term.column

    def check_split(self) -> None:
        """Raises LawError for a form that has no best split of N and D."""
        if self.no_split is not None:
            raise LawError(*self.no_split)

    def reduced(self, parameters: Mapping[str, Value], held: Mapping[str, float | None]) -> TwoTerms[Value]:
        """The law as one of N_active and D alone, the other inputs held (by name; of a mixture its ratio,
        `n_total_over_active`, which makes a into a ratio^(-alpha rho)). Raises LawError for one that is missing.
        """
        size, tokens = self.size_term, self.token_term
        if size is None or tokens is None:
            raise LawError(f"Form {self.name} has no term of N, or none of D.", "Fit form nd.")
        constant, a = parameters[FLOOR], parameters[size.coefficient]
        for term in self.terms:
            if term not in (size, tokens):
                power = _held(term.input, held) ** -parameters[term.exponent]
                constant = constant + parameters[term.coefficient] * power
        if size.mix is not None:
            a = a * size.mix.ratio(held) ** (-parameters[size.exponent] * parameters[size.mix.parameter])
        b, beta = parameters[tokens.coefficient], parameters[tokens.exponent]
        gamma = 1.0 if self.join is None else parameters[self.join.parameter]
        return TwoTerms(constant, a, parameters[size.exponent], b, beta, gamma)

    def optimum(
        self,
        parameters: Mapping[str, float],
        compute_flops: float,
        *,
        kappa: float = 6.0,
        context_tokens: float | None = None,
        n_total_over_active: float | None = None,
    ) -> Optimum:
        """Minimise the loss over N and D at C = kappa N_active D, in closed form.

        Raises LawError for a form without a split, a missing T or ratio, and a law whose optimum lies at a boundary.
        """
        self.check_split()
        check_budget(compute_flops, kappa)
        held = {"context_tokens": context_tokens, RATIO: n_total_over_active}
        multiplier = n_total_over_active if self.mixed and n_total_over_active else 1.0
        return best_split(self.reduced(parameters, held), compute_flops, kappa, multiplier)

    def interior(self, theta_BP: Floats) -> Any:
        """Which parameters (B, P) have an interior optimum: the terms of N and of D are there; (B,) booleans.

        Raises LawError for a form without a split.
        """
        self.check_split()
        terms = (self.size_term, self.token_term)
        places = [self.names.index(term.coefficient) for term in terms if term is not None]
        return (theta_BP[:, places] > 0).all(axis=1)


def _held(wanted: Input, held: Mapping[str, float | None]) -> float:
    value = held.get(wanted.name)
    if value is None or not (math.isfinite(value) and value > 0):
        raise LawError(f"This law depends on {wanted}.", f"Give {wanted.name}, e.g. {wanted.example:g}.")
    return value


N_TERM = Term("a", "alpha", SIZE)
D_TERM = Term("b", "beta", TOKENS)
MIXTURE_TERM = Term("a", "alpha", N_ACTIVE, Mix("rho"))

"""Loss against compute alone: form "c"."""

from collections.abc import Mapping
from typing import Any

from escala.laws.form import FINE, Derived, Form, Term
from escala.laws.inputs import COMPUTE_FLOPS, N_ACTIVE, TOKENS


def six_n_d(known: Mapping[str, Any]) -> Any:
    """6 N_active D: forward and backward passes without attention (docs/theory D.2)."""
    return 6.0 * known[N_ACTIVE.name] * known[TOKENS.name]


FORM = Form(
    "c",
    "L_inf + a C^-alpha",
    (Term("a", "alpha", COMPUTE_FLOPS),),
    starts=FINE,
    derived=(
        Derived(
            COMPUTE_FLOPS,
            (N_ACTIVE.name, TOKENS.name),
            six_n_d,
            "The table has no compute_flops: 6 N_active D was used.",
        ),
    ),
    no_split=(
        "A law of loss against compute or energy alone has no split of N and D.",
        "Fit form nd.",
    ),
)

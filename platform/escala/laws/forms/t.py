"""Loss against the context length T alone, N and D being the same in all points: form "t" (docs/theory D.1)."""

from escala.laws.form import FINE, Form, Term
from escala.laws.inputs import CONTEXT_TOKENS

FORM = Form(
    "t",
    "L_inf + c T^-zeta",
    (Term("c", "zeta", CONTEXT_TOKENS),),
    starts=FINE,
    no_split=(
        "A law of loss against the context alone has no split of N and D, which its points do not vary.",
        "Fit form ndt to points of several N, D and T.",
    ),
)

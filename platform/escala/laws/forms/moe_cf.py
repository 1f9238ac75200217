"""Loss of mixtures of experts of several capacity factors: beyond it a token's expert leaves the token out."""

from escala.laws.form import D_TERM, MIXTURE_TERM, Form, Term
from escala.laws.inputs import Input

CAPACITY_FACTOR = Input(
    "capacity_factor", "tokens an expert takes over its even share", "capacity factor", 1.25
)

FORM = Form(
    "moe_cf",
    "L_inf + a N_eff^-alpha + b D^-beta + q capacity_factor^-eta, N_eff = N_total^rho N_active^(1-rho)",
    (MIXTURE_TERM, D_TERM, Term("q", "eta", CAPACITY_FACTOR)),
    no_split=(
        "Form moe_cf has no closed-form optimum: the loss falls with the capacity factor without a cost.",
        "Fit form moe at the capacity factor that you will train with.",
    ),
)

"""Loss against the energy of training."""

from escala.laws.form import FINE, Form, Term
from escala.laws.inputs import Input

ENERGY_JOULES = Input("energy_joules", "joules", "energy, joules", 1e9)

FORM = Form(
    "joules",
    "L_inf + a J^-alpha",
    (Term("a", "alpha", ENERGY_JOULES),),
    starts=FINE,
    no_split=(
        "A law of loss against compute or energy alone has no split of N and D.",
        "Fit form nd.",
    ),
)

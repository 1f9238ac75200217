"""Loss against N, D and the context length T, which costs attention. The closed-form optimum is of N and D at a given
T; a plan chooses T, too (escala.planning.split).
"""

from escala.laws.form import D_TERM, N_TERM, Form, Term
from escala.laws.inputs import CONTEXT_TOKENS

FORM = Form(
    "ndt",
    "L_inf + a N^-alpha + b D^-beta + c T^-zeta",
    (N_TERM, D_TERM, Term("c", "zeta", CONTEXT_TOKENS)),
)

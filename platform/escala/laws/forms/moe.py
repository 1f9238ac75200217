"""Loss of mixtures of experts against N_total, N_active and D; the optimum is at a given N_total/N_active."""

from escala.laws.form import D_TERM, MIXTURE_TERM, Form

FORM = Form(
    "moe",
    "L_inf + a N_eff^-alpha + b D^-beta, N_eff = N_total^rho N_active^(1-rho)",
    (MIXTURE_TERM, D_TERM),
)

"""Loss against N and D (Hoffmann et al. 2022)."""

from escala.laws.form import D_TERM, FINE, N_TERM, Form

FORM = Form("nd", "L_inf + a N^-alpha + b D^-beta", (N_TERM, D_TERM), starts=FINE)

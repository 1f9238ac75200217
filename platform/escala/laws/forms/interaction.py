"""Loss against N and D that bound each other: the two terms join in a power mean (docs/theory D.1).

Kaplan et al. (2020, arXiv:2001.08361), eq. 1.5, with the floor of Hoffmann et al. (2022). gamma = 1 is form nd, gamma
-> 0 the larger term alone. Where one term is far above the other, a, alpha, b, beta mean what they do in nd.
"""

from escala.laws.form import D_TERM, FINE, N_TERM, Form, Join

FORM = Form(
    "interaction",
    "L_inf + ((a N^-alpha)^(1/gamma) + (b D^-beta)^(1/gamma))^gamma",
    (N_TERM, D_TERM),
    starts=FINE,
    join=Join("gamma"),
)

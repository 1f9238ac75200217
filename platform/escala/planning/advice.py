"""What a reader of a plan should know, in plain words: docs/theory D.9, repeats, and what a zero term means."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from escala.laws.law import Law
from escala.planning.limits import FLAT
from escala.planning.plan import Plan
from escala.planning.split import SplitProblem, dense_split, gains_from_experts

USUAL_RATIO = (10.0, 30.0)  # tokens per active parameter (docs/theory D.9)
SIMILAR_EXPONENTS = 0.1  # |alpha - beta| up to which D/N hardly moves with compute, so the usual ratio holds
USUAL_EXPERTS = (8.0, 64.0)  # N_total/N_active (docs/theory D.9)
WORTHWHILE_EPOCHS = 4.0  # up to here repeats are nearly as good as new tokens (Muennighoff et al. 2023)


def advise(law: Law, q: SplitProblem, plan: Plan) -> Iterator[str]:
    """One sentence or a few per matter that is worth one."""
    if not USUAL_RATIO[0] <= plan.tokens_per_parameter <= USUAL_RATIO[1]:
        yield _unusual_ratio(law, q, plan)
    if law.form.mixed:
        experts = plan.n_total / plan.n_active
        if not USUAL_EXPERTS[0] <= experts <= USUAL_EXPERTS[1]:
            yield f"N_total/N_active is {experts:.3g}; public practice is 8 to 64."
        yield "The law has no capacity factor; 1.1 to 1.5 is usual."
        if not gains_from_experts(law):
            yield "rho is 0: by this law experts lower no loss, so N_total = N_active."
    if plan.epochs > WORTHWHILE_EPOCHS:
        yield (
            f"{plan.epochs:.3g} epochs over the unique data count as {plan.effective_tokens:.3g} new tokens; "
            "beyond 4 epochs repeats are worth visibly less (Muennighoff et al. 2023): find more data, or "
            "spend less."
        )
    context = law.form.term_of("context_tokens")
    if q.context_is_free and context is not None and not law.parameters[context.coefficient]:
        yield "The law's term of T is zero: by this law a longer context lowers no loss, so T is the least."
    elif q.context_is_free and not q.chi.scale:
        yield "chi is constant (Chi.scale is 0), so a longer context costs nothing here and T is at its bound."
    elif (
        q.context_is_free
        and plan.context_tokens == q.context[1]
        and q.chi.at(np.zeros(1), np.log(q.context[1:]))[1][0] < FLAT
    ):
        yield (
            f"What attention costs hardly grows with T here, so T is bounded by {q.longest} alone; a context beyond "
            "the length of the documents lowers no loss, whatever the law says."
        )
    if q.inference_tokens and q.target_nats is None and math.isinf(q.total_flops):
        yield "Hours limit training only, so the inference demand changed nothing."


def _unusual_ratio(law: Law, q: SplitProblem, plan: Plan) -> str:
    """Whether a limit or the law itself is why D/N_active is outside 10-30."""
    dense = dense_split(law, plan.compute_flops, q.kappa)  # the rule is of dense models
    own = dense.tokens / dense.size
    terms = (law.form.size_term, law.form.token_term)
    alpha, beta = (law.parameters[term.exponent] for term in terms if term is not None)
    said = f"{plan.tokens_per_parameter:.3g} tokens per active parameter, outside the usual 10 to 30"
    exponents = f"alpha = {alpha:.3g} and beta = {beta:.3g}"
    if USUAL_RATIO[0] <= own <= USUAL_RATIO[1]:
        return (
            f"{said}: limits, costs or experts do that; the law alone, of dense models, would take {own:.3g}."
        )
    if abs(alpha - beta) > SIMILAR_EXPONENTS:
        return f"{said}; with {exponents} that rule need not hold, and the ratio changes with compute."
    return (
        f"{said}; the law alone, of dense models, would take {own:.3g}. With {exponents}, this close, the "
        "usual ratio should hold: the law contradicts the rule of about 20 (Hoffmann et al. 2022). Their "
        "own law as first printed does so too, and its fit could not be reproduced (Besiroglu et al. "
        "2024, arXiv:2404.10102). Check the fit before you trust the split."
    )

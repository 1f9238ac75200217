"""What test_ppo_cached.py does on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.numerics.ppo_scenarios import (
    PROMPTS,
    RATE,
    config,
    critic_training,
    iterate,
    networks,
    rows,
    weights,
)
from workloads.alignment.learner import Learner
from workloads.training import zero


def learned(stage: int, budget: int, minibatches: int = 1) -> dict[str, Any]:
    """Two iterations of two epochs under a budget of tokens; how often each engine's module was called in each."""
    batch = {"prompts": PROMPTS, "epochs": 2, "minibatches": minibatches, "micro_batch_tokens": budget}
    section = config(stage, batch=batch)
    actor, critic, reference = networks(section)
    calls = {"actor": 0, "critic": 0}
    for name, model in (("actor", actor), ("critic", critic)):
        model.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    engine = zero.make_engine(actor, section.training, 1, 1)
    critic_engine = zero.make_engine(critic, critic_training(section), 1, 1)
    for one in (engine, critic_engine):
        zero.begin_restore(one, 0)
        zero.set_learning_rate(one, RATE)
    learner = Learner(section, engine, critic_engine, reference)
    found = []
    for iteration in range(2):
        calls.update(actor=0, critic=0)
        everyone, updates = iterate(section, learner, iteration)
        found.append({"updates": updates, "columns": everyone.columns, "calls": dict(calls)})
    return {"iterations": found, **weights(learner)}


def scenario(_: Path) -> dict[str, Any]:
    padded = PROMPTS * max(rows(0, 1).lengths)
    found = {
        f"{stage} {name}": learned(stage, budget)
        for stage in (0, 2)
        for name, budget in (("kept", 2 * padded), ("again", 2 * padded - 1))
    }
    found["minibatches"] = learned(0, 2 * padded, minibatches=2)
    return found

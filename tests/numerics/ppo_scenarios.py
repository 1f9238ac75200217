"""What each rank of test_ppo_ranks.py does.

One iteration from given responses: two minibatches and two epochs, by micro-batches of two or three rows, under ZeRO.
Rank 0 also makes it in plain PyTorch on whole minibatches.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from escala.schema import PpoConfig
from escala.storage.checkpoints import latest, open_checkpoints
from workloads.alignment import losses
from workloads.alignment.advantages import gae, whiten
from workloads.alignment.critic import Critic
from workloads.alignment.learner import Learner, critic_training, estimate, exchange, policy_weights
from workloads.alignment.microbatches import RolloutBatch, minibatches
from workloads.alignment.token_rewards import token_rewards
from workloads.model.lora import add_lora, merge_lora, without_lora
from workloads.model.transformer import Transformer
from workloads.model.weights import load_weights
from workloads.rewards.reward_model import RewardModel
from workloads.training import checkpoint, zero

PROMPTS, RATE, KL_COEF, TEMPERATURE = 10, 1e-2, 0.3, 0.7
BASE: dict[str, Any] = {
    "model": {"vocab_size": 53, "n_layers": 2, "d_model": 24, "n_heads": 2, "max_context_tokens": 32},
    "tokenizer": "none",
    "prompts": "none",
    "rewards": [{"kind": "function", "function": "a:b"}],
    "sampling": {"max_response_tokens": 16, "temperature": TEMPERATURE},
    "batch": {"prompts": PROMPTS, "epochs": 2, "minibatches": 2, "micro_batch_tokens": 48},
    "kl": {"place": "loss", "estimator": "k3"},
    "critic": {"learning_rate": RATE, "value_clip": 0.2},
    "policy_loss": {"clip_high": 0.3, "dual_clip": 3.0, "entropy_coefficient": 0.01},
    # With a usual epsilon Adam's first step is the gradient's sign, and rounding near 0 becomes a whole step.
    "training": {
        "zero_param_persistence_threshold": 0,
        "optimizer": {"learning_rate": RATE, "eps": 1e-2, "clip_norm": 0.5},
    },
}


def config(stage: int, **changes: Any) -> PpoConfig:
    return PpoConfig(**{**BASE, **changes, "training": {**BASE["training"], "zero_stage": stage}})


def rows(rank: int, ranks: int) -> RolloutBatch:
    """Ragged, with responses of one token; the prompts rank, rank + ranks, ... of all."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(int(torch.randint(1, 6, (), generator=generator)), 1 + (7 * n) % 13) for n in range(PROMPTS)]
    whole = [torch.randint(1, 53, (p + r,), generator=generator).tolist() for p, r in sizes]
    mine = range(rank, PROMPTS, ranks)
    found = RolloutBatch([whole[n] for n in mine], [sizes[n][0] for n in mine], {})
    found.columns["engine_logp"] = torch.zeros(found.mask_BT.shape)
    return found


def scores(rank: int, ranks: int) -> Tensor:
    return torch.linspace(-1, 2, PROMPTS)[rank::ranks]


def after(rank: int, ranks: int, values_B: Tensor) -> Tensor:
    """Every third response was cut off."""
    return torch.where(torch.arange(PROMPTS)[rank::ranks] % 3 == 0, values_B, 0.0)


def networks(section: PpoConfig) -> tuple[Transformer, Critic, Transformer]:
    """Actor, critic and a reference that is another model."""
    torch.manual_seed(0)
    actor, critic = Transformer(section.model), Critic(RewardModel(Transformer(section.model)))
    reference = copy.deepcopy(actor)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return actor, critic, reference.requires_grad_(False)


def learned(stage: int, directory: Path) -> dict[str, Any]:
    """Our learner's iteration; then a checkpoint of both engines and another iteration, from it and straight on."""
    section = config(stage)
    actor, critic, reference = networks(section)
    engine = zero.make_engine(actor, section.training, 1, 1)
    critic_engine = zero.make_engine(critic, critic_training(section), 1, 1)
    for one in (engine, critic_engine):
        zero.begin_restore(one, 0)
    learner = Learner(section, engine, critic_engine, reference)
    everyone, updates = iterate(section, learner, 0)
    found: dict[str, Any] = {"columns": everyone.columns, "updates": updates, **weights(learner)}
    checkpoint.save(engine, open_checkpoints(directory), 1, {"config": {}}, 1, {"critic": critic_engine})
    iterate(section, learner, 1)
    found["straight"] = weights(learner)

    actor, critic, _ = networks(section)
    again = Learner(
        section,
        zero.make_engine(actor, section.training, 1, 1),
        zero.make_engine(critic, critic_training(section), 1, 1),
        reference,
    )
    saved, _ = latest(open_checkpoints(directory))
    assert saved is not None
    checkpoint.load(again.actor, saved, {"critic": again.critic})
    iterate(section, again, 1)
    found["resumed"] = weights(again)
    found["actor_only"] = sorted(load_weights(saved)) == sorted(dict(actor.named_parameters()))
    return found


def iterate(section: PpoConfig, learner: Learner, iteration: int) -> tuple[RolloutBatch, dict[str, float]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = rows(rank, ranks)
    columns, last_B, _ = learner.assess(mine)
    mine.columns.update(columns)
    groups = torch.arange(PROMPTS)[rank::ranks]
    mine.columns.update(
        estimate(section, mine, scores(rank, ranks), groups, after(rank, ranks, last_B), KL_COEF)
    )
    everyone = exchange(mine, PROMPTS, 1)
    for engine in (learner.actor, learner.critic):
        zero.set_learning_rate(engine, RATE)
    updates = learner.update(everyone, iteration, KL_COEF, freeze_actor=False)
    return everyone, {k: float(v) for k, v in vars(updates).items()}


def weights(learner: Learner) -> dict[str, dict[str, Tensor]]:
    return {"actor": policy_weights(learner.actor), "critic": policy_weights(learner.critic)}


def plain() -> dict[str, Any]:
    """The same iteration, each minibatch whole, by torch alone and the pure losses."""
    section = config(0)
    actor, critic, reference = networks(section)
    whole = rows(0, 1)
    mask = whole.mask_BT
    width = max(whole.lengths)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in whole.sequences])
    prompts = torch.tensor(whole.prompt_lengths)
    place = (prompts[:, None] - 1 + torch.arange(mask.shape[1])).clamp(
        max=width - 1
    )  # predicts response token t

    def policy(model: Transformer) -> tuple[Tensor, Tensor]:
        logits = model(tokens).gather(1, place[..., None].expand(-1, -1, 53)) / TEMPERATURE
        targets = tokens.gather(1, (place + 1).clamp(max=width - 1))
        return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0], logits

    def value(model: Critic) -> Tensor:
        return model(tokens, torch.ones_like(tokens, dtype=torch.bool)).reshape(tokens.shape)

    with torch.no_grad():
        old, ref, everywhere = policy(actor)[0], policy(reference)[0], value(critic)
        values = everywhere.gather(1, place)
        ends = everywhere.gather(1, torch.tensor(whole.lengths)[:, None] - 1)[:, 0]
        rewards = token_rewards(scores(0, 1), old, ref, mask, 0.0)
        advantages, returns = gae(rewards, values, mask, 1.0, 0.95, after(0, 1, ends))
        n, mean = mask.sum(), advantages[mask].double().mean()
        advantages = ((advantages - mean) * (advantages[mask].double().var() + 1e-8).rsqrt()).float() * mask
        assert n > 1
    adam = {"lr": RATE, "betas": (0.9, 0.95), "eps": 1e-2, "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW(model.parameters(), **adam) for model in (actor, critic)]
    for epoch in range(2):
        for part in minibatches(PROMPTS, 2, 0, 0, epoch):
            (logp, logits), m = policy(actor), mask[part]
            loss = losses.policy_loss(logp[part], old[part], advantages[part], m, 0.2, 0.3, 3.0)
            loss = loss + KL_COEF * losses.kl_loss(logp[part], ref[part], m, "k3")
            loss = loss - 0.01 * losses.entropy(logits[part], m)
            gathered = value(critic).gather(1, place)
            critic_loss = losses.value_loss(gathered[part], values[part], returns[part], m, 0.2)
            for model, optimizer, one in zip((actor, critic), optimizers, (loss, critic_loss), strict=True):
                optimizer.zero_grad()
                one.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    columns = {
        "logp_old": old,
        "logp_ref": ref,
        "values": values,
        "advantages": advantages,
        "returns": returns,
    }
    return {
        "columns": {name: torch.where(mask, column, 0.0) for name, column in columns.items()},
        "actor": {k: v.detach() for k, v in actor.named_parameters()},
        "critic": {k: v.detach() for k, v in critic.named_parameters()},
    }


def lora() -> dict[str, Any]:
    """What is published of a LoRA actor, its reference, and that whitening spans the ranks."""
    section = config(
        3,
        lora={"rank": 2},
        critic=None,
        advantage={"kind": "rloo"},
        batch={**BASE["batch"], "responses_per_prompt": 2},
    )
    torch.manual_seed(0)
    model = Transformer(section.model)
    add_lora(model, section.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    tokens = torch.arange(8)[None]
    with torch.no_grad(), without_lora(model):
        reference = model(tokens)
    engine = zero.make_engine(model, section.training, 1, 1)
    zero.begin_restore(engine, 0)
    published = policy_weights(engine)
    with torch.no_grad(), without_lora(engine.module):
        found = engine(tokens)
    x = torch.arange(4.0).reshape(1, 4) + 4 * dist.get_rank()
    return {
        "published": published,
        "merged": {k: v.detach() for k, v in merged.named_parameters()},
        "reference": float((found - reference).abs().max()),
        "white": whiten(x, torch.ones_like(x)),
    }


def scenario(directory: Path) -> dict[str, Any]:
    found = {str(stage): learned(stage, directory / f"stage-{stage}") for stage in (0, 3)}
    found["lora"] = lora()
    found["plain"] = plain() if dist.get_rank() == 0 else {}
    return found

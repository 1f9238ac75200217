"""The critic of PPO: a reward model read at every token of a response, not only at its last (docs/theory C.2, C.4).

Dimensions: B batch, T context, N positions that are asked for.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from escala.contract.errors import CheckpointError
from escala.schema import PpoConfig
from workloads.model.start import find_checkpoint, has_scalar_head, load_model, new_model
from workloads.rewards.reward_model import HEAD_FILE, RewardModel, load_reward_model


class Critic(nn.Module):
    """The return that is expected from here on. Trunk and head are those of `scorer`, whose head starts near 0."""

    def __init__(self, scorer: RewardModel) -> None:
        super().__init__()
        self.trunk, self.head = scorer.trunk, scorer.head

    def forward(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        """fp32 values_N of the positions where `at_BT` is true, in row order: what follows the token there.

        Args:
            tokens_BT: token ids, padded on the right.
        """
        values_N1: Tensor = self.head(self.trunk.hidden(tokens_BT, at_BT=at_BT))
        return values_N1.squeeze(-1).float()


def build_critic(config: PpoConfig) -> Critic:
    """The critic that a run starts with; a fresh head is drawn from torch's generator.

    Raises CheckpointError where the start is not what the run was queued with.
    """
    section = config.critic
    if section is None:
        raise ValueError("this run has no critic")
    if section.start is None or section.start.path is None:
        return _prepared(Critic(RewardModel(new_model(config))), config)
    path = Path(section.start.path)
    if is_reward_model(path):
        scorer, _ = load_reward_model(path)
        critic = Critic(scorer)
    else:
        critic = Critic(RewardModel(load_model(path)))
    found, wanted = critic.trunk.config, section.model
    if wanted is not None and found.model_copy(update={"tie_embeddings": wanted.tie_embeddings}) != wanted:
        raise CheckpointError(
            f"{path} holds another model than the one that this run was queued with",
            "submit the job again: what stood there has been replaced",
        )
    return _prepared(critic, config)


def _prepared(critic: Critic, config: PpoConfig) -> Critic:
    critic.trunk.activation_checkpointing = config.training.activation_checkpointing
    return critic


def is_reward_model(path: Path) -> bool:
    """Whether a reward model's head stands at `path`, in a job's checkpoints or in a file of its own."""
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return (path / HEAD_FILE).is_file()
    return has_scalar_head(checkpoint)

"""A reward model: a transformer's trunk and one number read on the last valid token (docs/theory C.7).

On disk it is a directory in Hugging Face's layout for the trunk and the tokenizer, with the head in a file of its own.

Dimensions: B batch, T context, D model width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from escala.contract.errors import CheckpointError
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.dialogues import Prompt
from workloads.model.huggingface import load_pretrained, save_pretrained
from workloads.model.layers import Linear
from workloads.model.start import checkpoint_model, find_checkpoint, headless, load_tokenizer
from workloads.model.transformer import Transformer
from workloads.model.weights import load_weights

HEAD_FILE = "reward_head.safetensors"
HEAD_GAIN = 0.1  # rewards start near 0, so that the first loss is near log 2 whatever the trunk


class RewardModel(nn.Module):
    """Scores of whole answers. It takes `trunk` over, and drops its unembedding: nothing of it stays untrained.

    Every parameter is used through the forward pass of the module that holds it, so ZeRO-3's hooks see each use.
    """

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        trunk.unembedding = None
        trunk.config = headless(trunk.config)
        self.trunk = trunk
        self.head = Linear(trunk.config.d_model, 1, HEAD_GAIN)

    def forward(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """fp32 scores_B, read on token `lengths_B - 1` of each row.

        Args:
            tokens_BT: token ids, padded on the right; what stands there changes nothing, as attention is causal.
            lengths_B: valid tokens of each row, from 1 to T.
            positions_BT, documents_BT: as in `Transformer.forward`.
        """
        last_BT = last_tokens(tokens_BT, lengths_B)
        hidden_BD = self.trunk.hidden(tokens_BT, positions_BT, documents_BT, last_BT)
        scores_B: Tensor = self.head(hidden_BD).squeeze(-1).float()
        return scores_B

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The trunk's (`Transformer.auxiliary_losses`)."""
        return self.trunk.auxiliary_losses()


def answer_tokens(tokenizer: ChatTokenizer, prompt: Prompt, response: str) -> list[int]:
    """What a reward model reads, in training and scoring: prompt and response as a policy learns them, with the end."""
    return tokenizer.sequence(prompt, response)[0]


def pad_right(rows: list[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens_BT, lengths_B) of rows of token ids."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = [row + [padding] * (width - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)


def last_tokens(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Where each row's last valid token is, (B, T)."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device) == lengths_B.unsqueeze(-1) - 1


def save_reward_model(model: RewardModel, tokenizer: ChatTokenizer, directory: Path) -> None:
    """Write trunk, tokenizer and head into `directory`."""
    save_pretrained(model.trunk, directory)
    tokenizer.save(directory)
    save_file({"weight": model.head.weight.detach().float().cpu().contiguous()}, directory / HEAD_FILE)


def load_reward_model(directory: Path) -> tuple[RewardModel, ChatTokenizer]:
    """The reward model of a `reward` job's checkpoints, or what `save_reward_model` wrote.

    Raises CheckpointError where the head is missing or does not fit the trunk.
    """
    found = find_checkpoint(directory)
    if found is not None:
        weights = load_weights(found)
        if "head.weight" not in weights:
            raise CheckpointError(
                f"{found.address} is no reward model's.", "Give the checkpoints of a `reward` job."
            )
        return _with_head(checkpoint_model(found), weights["head.weight"], directory), load_tokenizer(
            directory
        )
    path = directory / HEAD_FILE
    try:
        weight = load_file(path)["weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{path} can't be read as a reward model's head: {error}.",
            "Give the directory of a reward model.",
        ) from error
    return _with_head(load_pretrained(directory), weight, directory), load_chat_tokenizer(directory)


def _with_head(trunk: Transformer, weight: Tensor, directory: Path) -> RewardModel:
    model = RewardModel(trunk)
    if weight.shape != model.head.weight.shape:
        raise CheckpointError(
            f"The head of {directory} has the shape {tuple(weight.shape)}, its trunk needs "
            f"{tuple(model.head.weight.shape)}.",
            "The directory was put together of two models: save it again.",
        )
    with torch.no_grad():
        model.head.weight.copy_(weight)
    return model

"""A decoder-only transformer in Llama's layout: RMSNorm, SwiGLU, RoPE, grouped-query heads, optional QK-norm.

Weights of Hugging Face's Llama family fit unchanged (names differ, shapes and channel order do not). Draw the
same weights again by calling `torch.manual_seed` before the constructor.

Dimensions: B batch, T context, D model width, H query heads, G key/value heads, S head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from escala.schema import ModelConfig
from workloads.model.attention import make_attention
from workloads.model.layers import Embedding, FeedForward, Linear, RMSNorm
from workloads.model.moe import MixtureOfExperts, mixtures
from workloads.model.rope import RotaryTable, rotate


class Attention(nn.Module):
    """Projections, optional norms of each head's query and key (Qwen3), RoPE, attention, output."""

    def __init__(self, config: ModelConfig, output_gain: float) -> None:
        super().__init__()
        d_model, size = config.d_model, config.head_size
        self.heads, self.kv_heads, self.size = config.n_heads, config.kv_heads, size
        self.core = make_attention(config)
        self.query = Linear(d_model, self.heads * size)
        self.key = Linear(d_model, self.kv_heads * size)
        self.value = Linear(d_model, self.kv_heads * size)
        self.output = Linear(self.heads * size, d_model, output_gain)
        self.query_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        prepared: Any,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D), or to (N, D) of the positions `at_N`; `rotation` from RotaryTable, `prepared`
        from AttentionModule.
        """
        q_BTHS = self.query_norm(self.query(x_BTD).unflatten(-1, (self.heads, self.size)))
        k_BTGS = self.key_norm(self.key(x_BTD).unflatten(-1, (self.kv_heads, self.size)))
        v_BTGS = self.value(x_BTD).unflatten(-1, (self.kv_heads, self.size))
        q_BTHS, k_BTGS = rotate(q_BTHS, *rotation), rotate(k_BTGS, *rotation)
        out_BTHS = self.core(q_BTHS, k_BTGS, v_BTGS, prepared=prepared)
        output: Tensor = self.output(_pick(out_BTHS.flatten(-2), at_N))
        return output


class Block(nn.Module):
    """Pre-norm attention and feed-forward (or mixture of experts), each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int = 0, expert_group: ProcessGroup | None = None) -> None:
        super().__init__()
        output_gain = 1 / math.sqrt(2 * config.n_layers)  # GPT-2: 2 residual additions a layer
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, output_gain)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        if config.moe is not None and config.has_experts(layer):
            self.feed_forward: nn.Module = MixtureOfExperts(config, config.moe, output_gain, expert_group)
        else:
            self.feed_forward = FeedForward(config.d_model, config.ff_size, output_gain)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        prepared: Any,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D), or to (N, D) of the positions `at_N`: past the attention the others cost nothing.
        Only a mixture of experts reads them all, since they count in its balance.
        """
        if at_N is not None and not isinstance(self.feed_forward, FeedForward):
            return _pick(self(x_BTD, rotation, prepared), at_N)
        mixed = self.attention(self.attention_norm(x_BTD), rotation, prepared, at_N)
        x = _pick(x_BTD, at_N) + mixed
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


def _pick(x_BTD: Tensor, at_N: Tensor | None) -> Tensor:
    """The positions `at_N` of all rows' together, (N, D); None: all, as they are."""
    return x_BTD if at_N is None else x_BTD.flatten(0, 1).index_select(0, at_N)


class Transformer(nn.Module):
    """The model of `config`.

    Args:
        expert_group: ranks that share the experts of each mixture: a rank draws them all, layer by layer, and keeps
            its own. None: this model has all.

    Attributes:
        activation_checkpointing: keep only each block's input and recompute the rest in the backward pass.
    """

    def __init__(self, config: ModelConfig, expert_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer, expert_group) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = None if config.tie_embeddings else Embedding(config.vocab_size, config.d_model)
        self._rotary = RotaryTable(config.head_size, config.rope_base)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        at_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits_BTV of the next token; with `at_BT`, logits_NV.

        Args:
            tokens_BT: token ids.
            positions_BT: for RoPE; None: 0..T-1. They turn queries and keys, they don't mask.
            documents_BT: a number for each token; no token sees one with another number (packing).
            at_BT: true at the N positions whose logits are wanted, in row order; the others' cost nothing.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, documents_BT, at_BT))

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        at_BT: Tensor | None = None,
    ) -> Tensor:
        """Final normed states_BTD, or states_ND of the positions `at_BT`: `logits` of a part of them is that part of
        `forward`'s.
        """
        x_BTD = self.embedding(tokens_BT)
        shared = self.shared(tokens_BT.shape[1], positions_BT, documents_BT, x_BTD)
        at_N = None if at_BT is None else at_BT.flatten().nonzero().squeeze(-1)
        for number, block in enumerate(self.blocks, 1):
            x_BTD = self.apply_layer(block, x_BTD, *shared, at_N if number == len(self.blocks) else None)
        normed: Tensor = self.final_norm(x_BTD)
        return normed

    def shared(
        self, context_tokens: int, positions_BT: Tensor | None, documents_BT: Tensor | None, like: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Any]:
        """What all layers of a forward pass share: RoPE's rotation, and what attention prepares."""
        rotation = self._rotary(context_tokens if positions_BT is None else positions_BT, like=like)
        return rotation, self.layers[0].attention.core.prepare(context_tokens, documents_BT, like.device)

    def apply_layer(self, layer: nn.Module, *arguments: Any) -> Tensor:
        """What a layer, or a part of one, makes of its arguments; with `activation_checkpointing` it is made again in
        the backward pass.
        """
        recompute = self.activation_checkpointing and is_grad_enabled()
        out: Tensor = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        return out

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of final normed states (..., D)."""
        logits: Tensor = (self.unembedding or self.embedding)(hidden=hidden)
        return logits

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Weighted losses of the last forward pass in training, to be added to the task's mean loss, by name; summed
        over layers. A dense model has none.
        """
        losses: dict[str, Tensor] = {}
        for mixture in mixtures(self):
            for name, loss in mixture.routing.losses.items() if mixture.routing else ():
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

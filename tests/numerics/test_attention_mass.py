"""The share of attention mass in a window, against the whole matrix of weights."""

from __future__ import annotations

import pytest
import torch

from escala.schema import ModelConfig
from workloads.model.attention.mass import mass_in_window, measured_mass
from workloads.model.transformer import Transformer


def weights(q: torch.Tensor, k: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(S)) of all queries and keys, (B, H, T, T), by its definition."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("bths,buhs->bhtu", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return logits.masked_fill(~seen, float("-inf")).softmax(-1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 17, 150])
def test_it_is_the_weights_own_sum(window: int, packed: bool) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 301, heads, 8, dtype=torch.float64) * 2 for heads in (4, 2))
    documents = torch.tensor([[0] * 100 + [1] * 201, [0] * 290 + [1] * 11]) if packed else None
    found = weights(q, k, documents)
    sees = (found > 0).sum(-1) > window
    distance = torch.arange(301)[:, None] - torch.arange(301)
    near = (found * (distance < window)).sum(-1)
    total, count = mass_in_window(q, k, window, documents).tolist()
    assert count == sees.sum()
    assert total == pytest.approx(float(near[sees].sum()), rel=1e-12)


def test_all_layers_of_a_model_count_and_only_while_it_is_open() -> None:
    config = ModelConfig(vocab_size=64, n_layers=3, d_model=32, n_heads=2, max_context_tokens=48)
    model, tokens = Transformer(config), torch.randint(64, (2, 48))
    with measured_mass(model, 16) as found:
        model(tokens)
    assert found[1] == 3 * 2 * 2 * (48 - 16)
    assert 0 < found[0] < found[1]
    before = found.clone()
    model(tokens)
    assert torch.equal(found, before)


def test_uniform_attention_has_the_window_s_share() -> None:
    """Keys of zero: every key weighs the same, W / n of n that are seen."""
    q, k = torch.randn(1, 40, 2, 8), torch.zeros(1, 40, 2, 8)
    total, count = mass_in_window(q, k, 10).tolist()
    expected = sum(10 / seen for seen in range(11, 41)) * 2
    assert (total, count) == (pytest.approx(expected, rel=1e-6), 60)

"""Matrices stored smaller: codes, their packing, and a model whose matrices are (docs/theory E.6)."""

from __future__ import annotations

import pytest
import torch

from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.compression import MatrixChoice, QuantizationConfig
from escala.schema.matrices import block_matrices, matrix_bytes
from workloads.model.compression import quantize
from workloads.model.compression.activation_aware import scale_by_activations
from workloads.model.compression.layers import compress_model, decompress_model, matrices
from workloads.model.compression.plan import quantize_model
from workloads.model.compression.quantized import pack_codes, unpack_codes
from workloads.model.transformer import Transformer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("inputs", [1, 30, 64])
def test_codes_are_packed_without_holes_and_come_back(bits: int, inputs: int) -> None:
    codes_OI = torch.randint(2**bits, (5, inputs), dtype=torch.uint8)
    packed = pack_codes(codes_OI, bits)
    assert packed.shape == (5, -(-inputs * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, inputs), codes_OI)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, None), (4, 32), (4, 128), (6, 32)])
def test_nearest_codes_are_within_half_a_step(bits: int, group: int | None) -> None:
    weight_OI = torch.randn(16, 256)
    found = quantize(weight_OI, bits, group, "round")
    step_OI = found.scale_OG.float().repeat_interleave(found.group, 1)
    error_OI = (found.dequantize() - weight_OI).abs()
    # Scale and offset are rounded to bf16 first: 2^-8 of a code's reach, and of the offset.
    slack_OI = (2**bits * step_OI + weight_OI.abs().amax()) * 2**-8
    assert bool((error_OI <= step_OI / 2 + slack_OI).all())


def test_eight_bits_per_output_are_within_half_a_step() -> None:
    weight_OI = torch.randn(16, 256)
    found = quantize(weight_OI, 8)
    assert found.codes.dtype == torch.int8
    assert found.nbytes == 16 * 256 + 16 * 2
    error_OI = (found.dequantize() - weight_OI).abs()
    assert bool(
        (error_OI <= found.scale_OG.float() * (0.5 + 0.3)).all()
    )  # 127 codes of a rounded scale: 0.25 more


def test_half_quadratic_codes_are_nearer_in_the_norm_that_they_minimise() -> None:
    weight_OI = torch.randn(64, 256) ** 3
    near, better = (
        quantize(weight_OI, 4, 32, method).dequantize() - weight_OI for method in ("round", "hqq")
    )
    assert better.abs().pow(0.7).sum() < near.abs().pow(0.7).sum()


@pytest.mark.parametrize(("bits", "group"), [(1, None), (9, None), (4, 48), (4, 0)])
def test_what_has_no_codes_is_refused(bits: int, group: int | None) -> None:
    with pytest.raises(SpecError):
        quantize(torch.randn(4, 128), bits, group)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SpecError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), 8)


@pytest.mark.parametrize("moe", [None, {"experts": 4, "chosen": 2, "capacity_factor": None}])
def test_a_compressed_model_computes_what_its_plain_twin_does(moe: dict[str, object] | None) -> None:
    config = ModelConfig(vocab_size=128, n_layers=2, d_model=64, n_heads=2, max_context_tokens=16, moe=moe)
    model = Transformer(config).eval()
    kinds = [MatrixChoice(bits=8), MatrixChoice(bits=4, group=32), MatrixChoice(rank=8), MatrixChoice()]
    choices = {name: kinds[at % len(kinds)] for at, name in enumerate(matrices(model))}
    compress_model(model, choices)
    plain = decompress_model(model).eval()
    tokens_BT = torch.randint(128, (2, 16))
    torch.testing.assert_close(model(tokens_BT), plain(tokens_BT), rtol=1e-5, atol=1e-5)
    assert list(matrices(model)) == []
    assert not plain.config.tie_embeddings  # its table and its output product are two matrices now


def test_codes_and_scales_keep_their_types_when_a_model_is_cast() -> None:
    model = Transformer(ModelConfig(vocab_size=128, n_layers=1, d_model=64, n_heads=2, max_context_tokens=16))
    compress_model(model, {"blocks.0.attention.query": MatrixChoice(bits=4, group=32)})
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.to(torch.float64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers() if name in before)
    assert model.blocks[0].attention.query.scale.dtype == torch.bfloat16


def test_quantized_models_keep_what_they_are_told_to() -> None:
    model = _small()
    quantize_model(model, "int4", QuantizationConfig(keep=["blocks.0.*", "*.feed_forward.down"]))
    assert {name for name in matrices(model) if not name.startswith("blocks.0.")} == {
        "blocks.1.feed_forward.down"
    }
    query, output = model.blocks[1].attention.query.compressed, model.unembedding.compressed
    assert (query.bits, query.group, output.bits, output.group) == (4, 32, 8, 64)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [({"keep": ["blocks.7.*"]}, r"blocks\.7\.\*"), ({"group": 128}, r"blocks\.0\.attention\.query")],
)
def test_a_quantization_that_the_model_has_no_place_for_is_refused(
    quantization: dict[str, object], named: str
) -> None:
    with pytest.raises(SpecError, match=named):
        quantize_model(_small(), "int4", QuantizationConfig.model_validate(quantization))


def _small() -> Transformer:
    return Transformer(
        ModelConfig(vocab_size=128, n_layers=2, d_model=64, n_heads=2, max_context_tokens=16)
    ).eval()


MIXTURE = {"experts": 4, "chosen": 2, "every": 2, "shared_experts": 1}


def _grouped(moe: dict[str, object] | None) -> Transformer:
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "max_context_tokens": 64}
    torch.manual_seed(0)
    return Transformer(ModelConfig.model_validate({"vocab_size": 128, **shape, "moe": moe})).eval()


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_the_control_plane_knows_the_matrices_by_name(moe: dict[str, object] | None) -> None:
    model = _grouped(moe)
    known = {one.name: (one.outputs, one.inputs) for one in block_matrices(model.config)}
    assert known == {name: tuple(w.shape) for name, w in matrices(model).items() if name != "unembedding"}
    query, weight_OI = next(block_matrices(model.config)), model.blocks[0].attention.query.weight
    for choice in (MatrixChoice(bits=8), MatrixChoice(bits=4, group=32), MatrixChoice(bits=3, group=64)):
        assert matrix_bytes(query, choice) == quantize(weight_OI, choice.bits, choice.group, "round").nbytes


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_scaling_by_activations_is_exact_before_codes_are_chosen(moe: dict[str, object] | None) -> None:
    model, tokens_BT = _grouped(moe), torch.randint(128, (8, 64), generator=torch.Generator().manual_seed(1))
    before, weight = model(tokens_BT), model.blocks[0].attention.output.weight.detach().clone()
    scale_by_activations(model, tokens_BT, MatrixChoice(bits=4, group=32))
    torch.testing.assert_close(model(tokens_BT), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.blocks[0].attention.output.weight, weight)


def test_scaling_by_activations_helps_where_some_channels_are_large() -> None:
    """Large channels of the residual stream are what real models have (Lin et al. 2023, section 3.1)."""
    tokens_BT = torch.randint(128, (8, 64), generator=torch.Generator().manual_seed(1))
    changes = []
    for calibration_BT in (None, tokens_BT):
        model = _grouped(None)
        with torch.no_grad():
            for block in model.layers:
                block.attention_norm.weight[::8] *= 8
                block.feed_forward_norm.weight[::8] *= 8
        before = model(tokens_BT)
        quantize_model(model, "int4", QuantizationConfig(keep=["unembedding"]), calibration_BT)
        changes.append((model(tokens_BT) - before).square().mean().item())
    assert changes[1] < 0.7 * changes[0]


def test_a_calibration_of_codes_is_refused() -> None:
    model = _grouped(None)
    quantize_model(model, "int8", QuantizationConfig(keep=["blocks.0.*"]))
    with pytest.raises(SpecError, match="calibration"):
        quantize_model(model, "int4", QuantizationConfig(), torch.zeros(1, 8, dtype=torch.int64))

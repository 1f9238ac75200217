"""LoRA, packing and answers' log-probabilities against plain computations."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from escala.schema import LoraConfig, ModelConfig
from escala.schema.compression import QuantizationConfig
from workloads.data.examples import Sequences, pack, row_batch
from workloads.dpo import response_log_probabilities
from workloads.model.compression.layers import CompressedMatrix, decompress_model
from workloads.model.compression.plan import quantize_model
from workloads.model.lora import BASE_FILE, LoraMatrix, add_lora, merge_lora, save_adapter, without_lora
from workloads.model.transformer import Transformer
from workloads.sft import answer_loss

MODEL = ModelConfig(vocab_size=97, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_context_tokens=64)
ALL = LoraConfig(rank=3, alpha=6, targets=["query", "key", "value", "output", "gate", "up", "down"])


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODEL)


def with_deltas(config: LoraConfig = ALL) -> Transformer:
    """A model whose deltas are not zero."""
    built = model()
    add_lora(built, config)
    with torch.no_grad():
        for layer in built.modules():
            if isinstance(layer, LoraMatrix):
                layer.lora_B.normal_(std=0.1)
    return built


def test_fresh_deltas_change_nothing_and_trained_ones_do() -> None:
    plain, fresh = model(), model()
    add_lora(fresh, ALL)
    assert torch.equal(fresh(tokens()), plain(tokens()))
    assert not torch.allclose(with_deltas()(tokens()), plain(tokens()), atol=1e-3)


def test_only_deltas_are_trained() -> None:
    built = with_deltas(LoraConfig(rank=8))
    built(tokens()).square().sum().backward()
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.attention.{m}.lora_{x}" for i in (0, 1) for m in ("query", "value") for x in "AB"
    }
    assert all(p.grad is not None for n, p in built.named_parameters() if n in trained)
    assert all(p.grad is None for n, p in built.named_parameters() if n not in trained)


def test_merged_deltas_give_the_same_logits_under_plain_names() -> None:
    built = with_deltas()
    before = built(tokens())
    merge_lora(built)
    assert torch.allclose(built(tokens()), before, atol=1e-5)
    assert set(built.state_dict()) == set(model().state_dict())


def test_without_its_deltas_a_policy_is_its_reference() -> None:
    built = with_deltas()
    with without_lora(built):
        assert torch.equal(built(tokens()), model()(tokens()))
    assert not torch.equal(built(tokens()), model()(tokens()))


@pytest.mark.parametrize("moe", [None, {"experts": 4, "chosen": 2}])
def test_deltas_stand_on_a_base_in_codes(moe: dict[str, object] | None) -> None:
    """Trained, merged and compared: what is trained is the deltas, and what comes out is the base as it was stored, in
    plain fp32, with the deltas added.
    """
    torch.manual_seed(0)
    built = Transformer(ModelConfig.model_validate(MODEL.model_dump() | {"moe": moe}))
    stored = copy.deepcopy(built).eval()
    quantize_model(stored, "int4", QuantizationConfig(keep=["unembedding"]))
    add_lora(built.eval(), LoraConfig(rank=3, targets=["query", "output"], base="int4"))
    with torch.no_grad():
        assert torch.allclose(built(tokens()), decompress_model(stored).eval()(tokens()), atol=1e-5)
        for layer in built.modules():
            if isinstance(layer, LoraMatrix):
                layer.lora_B.normal_(std=0.1)
    before = built(tokens())
    before.square().sum().backward()
    assert {n.rsplit(".", 1)[1] for n, p in built.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }
    assert isinstance(built.blocks[0].attention.key, CompressedMatrix)  # no target, and frozen like one
    with without_lora(built):
        assert torch.allclose(built(tokens()), decompress_model(stored).eval()(tokens()), atol=1e-5)
    merge_lora(built)
    assert torch.allclose(built(tokens()), before, atol=1e-5)
    assert set(built.state_dict()) == set(Transformer(built.config).state_dict())


def test_a_cast_model_keeps_its_codes_and_casts_its_deltas() -> None:
    built = model()
    add_lora(built, LoraConfig(base="int4"))
    built.bfloat16()
    query = built.blocks[0].attention.query
    assert (query.codes.dtype, query.scale.dtype, query.lora_A.dtype) == (
        torch.uint8,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert built(tokens()).isfinite().all()


def test_an_adapter_says_how_its_base_was_quantised(tmp_path: Path) -> None:
    config = LoraConfig(base="int4", quantization={"method": "round"})
    save_adapter(with_deltas(config).state_dict(), config, tmp_path)
    found = json.loads((tmp_path / BASE_FILE).read_text())
    assert (found["precision"], found["quantization"]["method"]) == ("int4", "round")


def test_peft_loads_the_adapter(tmp_path: Path) -> None:
    """On the same base in Hugging Face's layout, peft's logits are ours."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from workloads.model.huggingface import save_pretrained

    built = with_deltas()
    save_pretrained(model(), tmp_path / "base")
    save_adapter(built.state_dict(), ALL, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(theirs(tokens()).logits, built(tokens()), atol=1e-4)


def test_the_adapter_holds_deltas_alone(tmp_path: Path) -> None:
    save_adapter(with_deltas().state_dict(), ALL, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 2 * 2 * 7
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


def test_chosen_positions_give_the_same_logits_as_all() -> None:
    at_BT = torch.zeros(2, 12, dtype=torch.bool)
    at_BT[0, 3:7] = at_BT[1, 11] = True
    built = model()
    assert torch.allclose(built(tokens(), at_BT=at_BT), built(tokens())[at_BT], atol=1e-6)


def dialogues(count: int = 9) -> Sequences:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return Sequences.of(
        [
            (torch.randint(0, 97, (n,), generator=generator).tolist(), [i >= n // 2 for i in range(n)])
            for n in lengths
        ]
    )


def test_packed_and_unpacked_losses_and_gradients_are_equal() -> None:
    data, losses, gradients = dialogues(), [], []
    rows = pack(data.lengths.tolist(), 40)
    assert len(rows) < len(data)
    for part in (rows, [[n] for n in range(len(data))]):
        built = model()
        loss = answer_loss(built, row_batch(data, part)) / int(data.answer_counts().sum())
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_a_dialogue_does_not_see_its_neighbours_in_a_row() -> None:
    data, built = dialogues(3), model()
    batch = row_batch(data, [[0, 1, 2]])
    changed = copy.deepcopy(batch)
    first = int(data.lengths[0]) - 1
    changed["tokens_BT"][0, :first] = 0  # another first dialogue
    names = ("tokens_BT", "positions_BT", "documents_BT")
    before, after = built(*[batch[n] for n in names]), built(*[changed[n] for n in names])
    last = int((data.lengths - 1).sum())
    assert torch.equal(before[0, first:last], after[0, first:last])


def test_log_probabilities_of_responses_are_sums_over_their_tokens() -> None:
    data, built = dialogues(4), model()
    found = response_log_probabilities(built, row_batch(data, [[n] for n in range(4)]))
    for number in range(4):
        ids, answers = data.slice(number)
        logits = built(torch.tensor(ids[None, :-1], dtype=torch.long))[0].double().log_softmax(-1)
        by_hand = sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1) if answers[i + 1])
        assert float(found[number].detach()) == pytest.approx(by_hand, abs=1e-4)

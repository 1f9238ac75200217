"""GGUF files with codes: read as they are, written as they are, and opened by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from escala.contract.errors import CheckpointError
from escala.schema import ModelConfig
from escala.schema.compression import MatrixChoice, QuantizationConfig
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.model.compression.layers import CompressedMatrix, compress_model, decompress_model
from workloads.model.compression.plan import quantize_model
from workloads.model.compression.quantize import quantize
from workloads.model.gguf_in import load_gguf
from workloads.model.gguf_names import gguf_names, interleaved_rows
from workloads.model.gguf_out import gguf_blocks, save_gguf
from workloads.model.start import load_compressed
from workloads.model.transformer import Transformer

gguf = pytest.importorskip("gguf")
TOKENS = torch.arange(24).view(2, 12)


def model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    return Transformer(ModelConfig.model_validate({**shape, "max_context_tokens": 64, **changes})).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["def sum(a, b):\n    return a + b\n"] * 20, 300).save(str(file))
    return load_chat_tokenizer(file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_codes_are_read_as_they_stand(
    kind: str, tmp_path: Path, tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gguf package quantises the tensors of a plain file; its own dequantisation of them is ours, bit for bit."""
    plain, path = model(), tmp_path / "model.gguf"
    save_gguf(plain, path, tokenizer)
    type_ = gguf.GGMLQuantizationType[kind]
    file = gguf.GGUFWriter(tmp_path / "coded.gguf", "llama")
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            value = field.contents()
            (file.add_uint32 if isinstance(value, int) else file.add_float32)(name, value)
    file.add_token_list([f"t{n}" for n in range(300)])
    expected = {}
    ours = {theirs: name for name, theirs in gguf_names(plain.config).items()}
    for tensor in reader.tensors:
        data, raw = tensor.data, None
        if tensor.data.ndim == 2:
            data, raw = gguf.quants.quantize(np.array(tensor.data), type_), type_
            whole = torch.from_numpy(gguf.quants.dequantize(data, type_))
            rows = interleaved_rows(plain.config, ours[tensor.name])
            expected[ours[tensor.name]] = whole if rows is None else whole[torch.argsort(rows)]
        file.add_tensor(tensor.name, data, raw_dtype=raw)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    found = load_compressed(tmp_path / "coded.gguf")
    for name, weight in expected.items():
        module = found.get_submodule(name)
        coded = isinstance(module, CompressedMatrix)
        assert coded == (kind != "Q5_0" and name != "embedding")
        assert torch.equal(module.compressed.dequantize() if coded else module.weight, weight), name
    said = capsys.readouterr().out
    assert ("Q5_0" in said) == (kind == "Q5_0")
    assert torch.equal(found(TOKENS), found(TOKENS))


@pytest.mark.parametrize(
    ("precision", "quantization", "changes"),
    [
        ("int8", {}, {}),
        ("int8", {"group": 32}, {"tie_embeddings": False}),
        ("int4", {"keep": ["blocks.1.*", "unembedding"]}, {}),
        (
            "int4",
            {"group": 128, "method": "round"},
            {"d_model": 128, "d_ff": 256, "qk_norm": True, "head_dim": 128},
        ),
    ],
)
def test_what_is_written_comes_back_and_transformers_has_the_same_weights(
    precision: str,
    quantization: dict[str, object],
    changes: dict[str, object],
    tmp_path: Path,
    tokenizer: ChatTokenizer,
) -> None:
    transformers = pytest.importorskip("transformers")
    asked = QuantizationConfig.model_validate(quantization)
    stored = model(**changes)
    quantize_model(stored, "int8" if precision == "int8" else "int4", asked)
    save_gguf(stored, tmp_path / "model.gguf", tokenizer)
    again = load_gguf(tmp_path / "model.gguf")
    for name, module in stored.named_modules():
        if isinstance(module, CompressedMatrix):
            back = again.get_submodule(name).compressed
            assert torch.equal(back.unpacked_OI(), module.compressed.unpacked_OI())
            assert torch.equal(back.dequantize(), module.compressed.dequantize())
    assert torch.equal(again(TOKENS), stored(TOKENS))
    # A Qwen3 with heads of 128, since transformers does not read another size from the file.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, stored(TOKENS), rtol=0, atol=1e-4)
    own = decompress_model(again).blocks[1].attention.key.weight
    assert torch.equal(theirs.model.layers[1].self_attn.k_proj.weight, own)


def test_the_tokenizer_in_the_file_gives_the_same_ids(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    save_gguf(model(), tmp_path / "model.gguf", tokenizer)
    again = load_chat_tokenizer(tmp_path / "model.gguf")
    text = "def total(a, b):\n    return 12 + 345  # done"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.end_of_text == tokenizer.end_of_text


def test_other_widths_are_written_whole(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    stored = model()
    kinds = {"query": MatrixChoice(bits=3, group=32), "key": MatrixChoice(rank=4), "value": MatrixChoice()}
    compress_model(stored, {f"blocks.0.attention.{name}": choice for name, choice in kinds.items()})
    save_gguf(stored, tmp_path / "model.gguf", tokenizer)
    again = load_gguf(tmp_path / "model.gguf")
    assert not any(isinstance(module, CompressedMatrix) for module in again.modules())
    assert torch.equal(again(TOKENS), decompress_model(stored).eval()(TOKENS))


def test_a_scale_that_fp16_does_not_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="fp16"):
        gguf_blocks("blocks.0.attention.query", quantize(torch.randn(4, 32) * 1e-7, 8))

"""The header of a GGUF file, versions 2 and 3, read with the standard library: a few milliseconds, where the `gguf`
package takes seconds to index every token. Little-endian files only.

Layout: "GGUF", version u32, tensors u64, keys u64; each key: name, type u32, value; each tensor: name, dimensions
u32, that many u64, kind u32, offset u64. A string is its length u64 and its bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from escala.schema.model import ModelConfig

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Value = str | int | float | bool | list[int | float | bool] | None


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (lists of strings are None: nobody here needs them) and each tensor's shape, outermost first."""

    metadata: dict[str, Value]
    shapes: dict[str, tuple[int, ...]]


def model_config_of_gguf(path: Path) -> ModelConfig:
    """The ModelConfig of a GGUF file of architecture llama (Llama and Mistral) or qwen3.

    Raises ValueError where the transformer cannot represent it, or the file cannot be read.
    """
    header = read_gguf_header(path)
    data, shapes = header.metadata, header.shapes
    architecture = data.get("general.architecture")
    if architecture not in ("llama", "qwen3"):
        raise ValueError(f"its architecture {architecture!r} is not known here (llama, qwen3 are)")

    def get(key: str, default: Any = None) -> Any:
        value = data.get(f"{architecture}.{key}", default)
        if isinstance(value, list) and len(set(value)) != 1:
            raise ValueError(f"its layers differ in {key}; here all are alike")
        return value[0] if isinstance(value, list) else value

    if get("expert_count", 0):
        raise ValueError("it is a mixture of experts, which no GGUF entry here reads")
    if (
        get("rope.scaling.type", "none") != "none"
        or get("rope.scale_linear", 1) != 1
        or "rope_freqs.weight" in shapes
    ):
        kind = get("rope.scaling.type", "factors of each frequency")
        raise ValueError(f"its RoPE is scaled ({kind}); only plain RoPE is known here")
    biases = sorted(name for name in shapes if name.endswith(".bias"))
    if biases:
        raise ValueError(f"it has biases ({biases[0]}); projections here have none")
    if "token_embd.weight" not in shapes:
        raise ValueError("its header lists no token_embd.weight")
    width, heads = get("embedding_length"), get("attention.head_count")
    if not width or not heads:
        raise ValueError("its header lacks embedding_length or attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    turned = get("rope.dimension_count", head_dim)
    if turned != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"its keys ({head_dim}), values and RoPE ({turned}) differ in size; here they are one"
        )
    return ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        n_layers=get("block_count"),
        d_model=width,
        n_heads=heads,
        n_kv_heads=get("attention.head_count_kv"),
        d_ff=get("feed_forward_length"),
        max_context_tokens=get("context_length"),
        head_dim=head_dim,
        rope_base=_decimal(get("rope.freq_base", 10_000.0)),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon", 1e-6)),
        tie_embeddings="output.weight" not in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        window_tokens=get("attention.sliding_window"),
    )


def _decimal(value: float) -> float:
    """A float32's shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises ValueError where `path` is no GGUF file that we can read."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not start with GGUF")
            version = _number(stream, "I")
            if version not in (2, 3):
                raise ValueError(
                    f"{path} is of GGUF version {version}; versions 2 and 3 (little-endian) can be read"
                )
            tensors, keys = int(_number(stream, "Q")), int(_number(stream, "Q"))
            metadata = {_string(stream): _value(stream, int(_number(stream, "I"))) for _ in range(keys)}
            shapes = dict(_tensor(stream) for _ in range(tensors))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: its header is damaged ({error})") from error
    return GgufHeader(metadata, shapes)


def _number(stream: BinaryIO, kind: str) -> int | float | bool:
    number: int | float | bool = struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))[0]
    return number


def _string(stream: BinaryIO) -> str:
    return stream.read(int(_number(stream, "Q"))).decode()


def _value(stream: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _number(stream, _FORMATS[kind])
    element, count = int(_number(stream, "I")), int(_number(stream, "Q"))
    if element == _STRING:
        for _ in range(count):
            stream.seek(int(_number(stream, "Q")), 1)
        return None
    return [_number(stream, _FORMATS[element]) for _ in range(count)]


def _tensor(stream: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name = _string(stream)
    dimensions = int(_number(stream, "I"))
    shape = tuple(int(_number(stream, "Q")) for _ in range(dimensions))
    stream.seek(12, 1)
    return name, shape[::-1]

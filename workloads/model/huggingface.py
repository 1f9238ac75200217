"""Models in Hugging Face's format: safetensors with a config.json in and out, GGUF in (dequantised by transformers).

No code and no pickle of a model is ever run: `trust_remote_code` is never passed, and pytorch_model.bin is refused.
Which formats, and what their weights are called: `escala.schema.architectures`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from escala.contract.errors import CheckpointError, NotFoundError
from escala.contract.files import replacing
from escala.contract.records import write_json
from escala.schema import ModelConfig
from escala.schema.architectures import architecture_for, their_names
from escala.schema.attention.exact import ExactAttention
from escala.schema.pretrained import model_config_of, to_hugging_face
from workloads.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_pretrained(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in a Hugging Face directory (safetensors, sharded or not) or a .gguf file, on the CPU.

    The model is built on meta and takes the loaded tensors as its own: peak memory is the weights once (a GGUF
    file's: the weights in `dtype`, and its largest tensor in fp32).

    Raises:
        NotFoundError: there is nothing at `path`.
        CheckpointError: it is no model that the transformer can represent, or its tensors are not those that its
            config.json announces; for a .gguf file also where gguf or accelerate is not installed.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"there is no model at {path}",
            "give a directory or a .gguf file of this machine; download it first",
        )
    try:
        config = model_config_of(path)
        architecture = architecture_for(config)
    except ValueError as error:
        raise CheckpointError(
            str(error), "give a Llama, Mistral, Mixtral or Qwen3 model without such parts"
        ) from error
    with torch.device("meta"):
        model = Transformer(config)
    parts = {
        theirs: (ours, part)
        for ours in model.state_dict()
        for part, theirs in enumerate(their_names(ours, architecture, config))
    }
    tensors = _gguf_tensors(path, config, dtype) if path.suffix == ".gguf" else _safetensors(path)
    state: dict[str, Tensor] = {}
    missing, head = set(parts), None
    for name, tensor in tensors:
        if name in parts:
            _place(path, name, tensor.to(dtype), *parts[name], model, state)
            missing.discard(name)
        elif config.tie_embeddings and name == "lm_head.weight":
            head = tensor.to(dtype)
        elif not name.endswith("rotary_emb.inv_freq"):  # old files': it follows from the config
            raise CheckpointError(f"{path} has a tensor that a {architecture.class_name} has not: {name}")
    if missing:
        raise CheckpointError(f"{path} lacks the tensor {min(missing)}")
    if head is not None and not torch.equal(head, state["embedding.weight"]):
        raise CheckpointError(
            f"{path} has an lm_head.weight that is not the embedding's, and its config.json says that they are one "
            "(tie_word_embeddings: true)",
            "set tie_word_embeddings to false in its config.json, if the head in the file is meant",
        )
    model.load_state_dict(state, assign=True)
    return model


def save_pretrained(model: Transformer, path: str | Path, end_of_text: int | None = None) -> None:
    """Write `model` (whole, on any device) as config.json and model.safetensors in directory `path`, made if missing.

    Args:
        end_of_text: where transformers' and vLLM's generation stops; None: the model does not say.

    Raises CheckpointError where Hugging Face's formats cannot express the model.
    """
    directory = Path(path).expanduser()
    try:
        settings = to_hugging_face(model.config)
        architecture = architecture_for(model.config)
        tensors: dict[str, Tensor] = {}
        for ours, tensor in model.state_dict().items():
            names, whole = their_names(ours, architecture, model.config), tensor.detach().cpu().contiguous()
            tensors |= zip(names, whole if len(names) > 1 else [whole], strict=True)
    except ValueError as error:
        raise CheckpointError(str(error), "such a model can be used within escala only") from error
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings |= {
        "torch_dtype": dtype,
        "bos_token_id": None,  # else transformers takes the class's own, 1 and 2
        "eos_token_id": end_of_text,
    }
    directory.mkdir(parents=True, exist_ok=True)
    # By another name first: the model may hold this very file's pages, if it was loaded from here.
    with replacing(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(directory / "config.json", settings)


def _safetensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each in the directory's safetensors. Raises CheckpointError."""
    for file in _files(directory):
        try:
            with safe_open(file, framework="pt") as reader:
                for name in list(reader.keys()):
                    yield name, reader.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{directory / INDEX} can't be read: {error!r}") from error
        files = [directory / Path(name).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}, which its index names")
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise CheckpointError(
            f"{directory} has its weights as pickles (*.bin), which can run code when they are read",
            "get or make the safetensors version of the model",
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS} and no {INDEX}")


def _gguf_tensors(path: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A .gguf file's tensors under Hugging Face's names and in its channel order (GGUF permutes Llama's q and k)."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{path} can't be read: {' and '.join(missing)} not installed", f"pip install {' '.join(missing)}"
        )
    import transformers

    # Our configuration, since transformers leaves out Qwen3's head size; without the window, which no weight depends
    # on: a GGUF file calls Mistral llama, and as a Mistral transformers refuses it.
    settings = to_hugging_face(
        config.model_copy(update={"attention": ExactAttention(), "window_tokens": None})
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        config=transformers.AutoConfig.for_model(**settings),
        dtype=dtype,
        local_files_only=True,
    )
    yield from theirs.state_dict().items()


def _place(
    path: Path, name: str, tensor: Tensor, ours: str, part: int, model: Transformer, state: dict[str, Tensor]
) -> None:
    """Put their tensor `name` into `state` as our weight `ours`, or as its part of a stack of experts. Raises
    CheckpointError where its shape is not what the configuration asks for.
    """
    wanted = model.get_parameter(ours)
    is_stack = wanted.ndim == tensor.ndim + 1
    if tensor.shape != (wanted.shape[1:] if is_stack else wanted.shape):
        asked = tuple(wanted.shape[1:] if wanted.ndim > 2 else wanted.shape)
        raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, its configuration asks for {asked}")
    if not is_stack:
        state[ours] = tensor
        return
    if ours not in state:
        state[ours] = torch.empty(wanted.shape, dtype=tensor.dtype)
    state[ours][part] = tensor

"""tests/gpu needs torch, pydantic and pytest alone; and what is chosen on GPUs, as far as a CPU can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import Backend, BackendConfig

from escala.schema import ModelConfig
from escala.schema.serve import ServeConfig
from workloads.model.attention import exact
from workloads.serving.scores import _device
from workloads.training.device import process_group_backend
from workloads.training.loss import chunk_rows

ROOT = Path(__file__).parents[2]
ALLOWED = ("torch", "pydantic", "pytest")
OURS = {"escala", "workloads", "tune_spaces", "tests"}
# Run before anything else: what such a machine may lack is not found, as it is not there.
REFUSE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED or not hasattr(self.finder, "find_spec"):
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import pytest
sys.exit(pytest.main(["--confcutdir=tests/gpu", "tests/gpu", "-q", "-W", "ignore", "-k", CHOSEN]))
"""


def needed(names: tuple[str, ...]) -> set[str]:
    """The distributions that these bring, themselves included, by their normal names."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        waiting += [re.split(r"[^\w.-]", text)[0] for text in wanted if "extra ==" not in text]
    return found


@pytest.mark.slow
def test_the_tests_on_gpus_need_torch_and_pydantic_alone() -> None:
    """All are collected, and some run on the CPU, while every other installed package is refused."""
    kept = needed(ALLOWED)
    refused = {
        top
        for top, owners in packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & kept
    } - OURS
    assert {"ray", "deepspeed", "numpy", "tokenizers", "safetensors", "transformers", "mlflow"} <= refused
    chosen = (
        "test_moe.py or test_losses.py or test_layers.py or test_generation_network.py or test_the_update"
    )
    code = f"REFUSED, CHOSEN = {refused!r}, {chosen!r}\n{REFUSE}"
    path = os.pathsep.join((str(ROOT / "platform"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "GPU_TESTS_DEVICE": "cpu"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("OUT", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 50, done.stdout[-2000:]


def test_repeated_heads_are_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    core = exact.make_attention(ModelConfig(d_model=64, n_heads=4, n_kv_heads=2))
    found = []
    for grouped in (True, False):
        monkeypatch.setattr(exact, "_takes_grouped_heads", lambda q, mask, grouped=grouped: grouped)
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 24, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        out = core.attend(q, k, v, None)
        out.square().sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("dtype", "masked", "grouped"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_heads_are_repeated_where_no_fused_kernel_takes_groups(
    dtype: torch.dtype, masked: bool, grouped: bool
) -> None:
    """Torch's meta device stands for one that is no CPU."""
    q = torch.empty(2, 8, 4, 16, dtype=dtype, device="meta")
    mask = torch.empty(8, 8, dtype=torch.bool, device="meta") if masked else None
    assert exact._takes_grouped_heads(q, mask) is grouped
    assert exact._takes_grouped_heads(torch.empty_like(q, device="cpu"), mask)


def test_a_gpu_gets_larger_chunks_of_logits() -> None:
    logits = torch.empty(4, 32_768)
    assert chunk_rows(logits) == 64
    assert chunk_rows(logits.to("meta")) == 2048


def test_ranks_on_gpus_have_a_backend_for_each_device() -> None:
    backends = BackendConfig(Backend(process_group_backend(on_gpu=True))).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    assert process_group_backend(on_gpu=False) == "gloo"


def test_a_replica_without_a_gpu_takes_none_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device(torch, ServeConfig.model_construct(replica_gpus=0.0)).type == "cpu"
    assert _device(torch, ServeConfig.model_construct(replica_gpus=0.5)).type == "cuda"

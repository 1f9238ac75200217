"""The rollout service on a cluster that grows: replicas without room bring nodes, and nodes without replicas go.

Ray's own autoscaler decides; its fake provider's nodes are processes of this machine. The cluster is not the
session's: the service is put on it as on any existing one, by ESCALA_RAY_ADDRESS.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from escala import Escala
from escala.managed import ray_command, ray_directory, ray_environment, ray_nodes_alive
from escala.processes import Command, Processes
from escala.schema import ModelConfig
from escala.settings import Settings
from escala.views.rollouts import DeploymentView
from tests.conftest import free_ports, wait_for
from workloads.data.tokenizer import train_tokenizer
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer

pytestmark = [pytest.mark.nightly(minutes=2), pytest.mark.timeout(500)]

REPLICAS, CLIENTS, TOKENS = 3, 12, 200
IDLE_SECONDS = 6.0  # after which the autoscaler takes a node away
HEAD, WORKER = "ray.head.default", "worker"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",  # a node's proxy stays for 30 s after its last replica
}
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def autoscaling(gcs_address: str) -> dict[str, Any]:
    """What Ray's autoscaler keeps to: a head of one CPU, and up to two nodes of one CPU beside it."""
    one = {"resources": {"CPU": 1}, "node_config": {}}
    return {
        "cluster_name": "growing",
        "max_workers": REPLICAS - 1,
        "upscaling_speed": REPLICAS,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": {
            "type": "external",  # by its own name it looks for a file that Ray's wheel does not hold
            "module": PROVIDER,
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: one | {"max_workers": 0},
            WORKER: one | {"min_workers": 0, "max_workers": REPLICAS - 1},
        },
        "head_node_type": HEAD,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in COMMANDS},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


def head_with_an_autoscaler(own: Settings) -> Command:
    """`ray start --head`: the head that escala starts has no autoscaler."""
    (client,) = free_ports(1)
    config = own.home / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(own.gcs_address)))
    arguments = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--node-ip-address", "127.0.0.1", "--port", str(own.ray_port),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(own.ray_dashboard_port),
        "--num-cpus", str(own.num_cpus), "--temp-dir", str(ray_directory(own)),
        "--ray-client-server-port", str(client), "--dashboard-agent-listen-port", "0",
        "--min-worker-port", "0", "--max-worker-port", "0",
        "--disable-usage-stats", "--log-color", "false", "--autoscaling-config", str(config),
    ]  # fmt: skip
    head = ray_command(own)
    return replace(head, arguments=arguments, environment={**head.environment, **AUTOSCALER})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[None]:
    """A head with an autoscaler, which this process is told of as of an existing one."""
    ray, dashboard, rollouts = free_ports(3)
    own = Settings(home=tmp_path, ray_port=ray, ray_dashboard_port=dashboard, num_cpus=1)
    command = head_with_an_autoscaler(own)
    processes = Processes(tmp_path)
    processes.make_directories()
    with pytest.MonkeyPatch.context() as patch:
        try:  # it is started again where it ends: Ray gives up after 30 s, which a busy machine may take
            wait_for(
                lambda: (processes.alive("ray") or processes.launch(command)) and command.ready(),
                120,
                "the head",
            )
            for name, value in ray_environment(own).items():
                patch.setenv(name, value)
            patch.setenv("ESCALA_RAY_ADDRESS", own.gcs_address)
            patch.setenv("ESCALA_RAY_DASHBOARD", own.ray_dashboard)
            patch.setenv("ESCALA_ROLLOUTS_PORT", str(rollouts))
            yield
        finally:
            processes.stop("ray")
            shutil.rmtree(ray_directory(own).parent, ignore_errors=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A random model with a tokenizer."""
    config = ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=2, max_context_tokens=1024)
    torch.manual_seed(0)
    save_pretrained(Transformer(config), tmp_path / "tiny")
    tokenizer = train_tokenizer([inspect.getsource(argparse)], config.vocab_size)
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"))
    return tmp_path / "tiny"


def policy() -> DeploymentView:
    return next(d for d in Escala().rollouts_status(weights=False).deployments if d.name == "policy")


def running() -> int:
    return sum(r.state == "RUNNING" for r in policy().replicas)


def nodes() -> int:
    return ray_nodes_alive(Settings())


def test_a_burst_brings_nodes_and_they_go_after_it_without_a_failed_request(
    cluster: None, directory: Path
) -> None:
    scaling = f"{{max_replicas: {REPLICAS}, up_seconds: 1, down_seconds: 4}}"
    args = [f"model={directory}", f"scaling={scaling}", "engine.max_running=2", "replica_cpus=1"]
    address = Escala().rollouts_up((), args, report=print).address
    assert (running(), nodes()) == (1, 1)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    started, over = time.monotonic(), threading.Event()

    def ask(number: int) -> int:
        more = {"ignore_eos": True}
        found = client.completions.create(
            model="tiny", prompt=[number + 1, 2], max_tokens=TOKENS, extra_body=more
        )
        return found.usage.completion_tokens

    def keep_asking(number: int) -> list[int]:
        found = [ask(number)]
        while not over.is_set():
            found.append(ask(number))
        return found

    def within(condition: Callable[[], bool], seconds: float, what: str) -> None:
        wait_for(condition, seconds, what, every=0.3)
        print(f"{what} after {time.monotonic() - started:.1f} s")

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        try:
            within(lambda: policy().target_replicas > 1, 15, "the first reaction")
            within(lambda: nodes() == REPLICAS, 90, "a node for each replica")
            within(lambda: running() == REPLICAS, 120, "all replicas")
        finally:
            over.set()
        counts = [count for answer in answers for count in answer.result()]
    print(f"{len(counts)} requests answered after {time.monotonic() - started:.1f} s")
    assert set(counts) == {TOKENS}
    within(lambda: policy().target_replicas == 1 and len(policy().replicas) == 1, 60, "one replica")
    within(lambda: nodes() == 1, 60, "one node")
    assert ask(0) == TOKENS
    Escala().rollouts_down(report=print)

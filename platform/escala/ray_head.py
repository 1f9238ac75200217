"""The head of the embedded cluster: `python -m escala.ray_head`, a process of `escala up`.

What `ray start --head --block` does, less what an idle home would pay for without use (benchmarks/idle.py):

- the Ray Client server, which that command always starts: our drivers run on the cluster (RAY_ADDRESS)
- the autoscaler's monitor: the embedded cluster is this machine alone
- of the dashboard the pages Metrics (it needs Prometheus and Grafana), Data (of Ray Data) and Train (its state is not
  tracked), and usage statistics; each page of the dashboard is a process
- the command itself, which imports Serve, FastAPI and pandas to wait for its children

It ends, with its children, within a second of the death of any of them; they end with it (PR_SET_PDEATHSIG).

Private names of Ray, for which pyproject.toml holds it at 2.60: Node, RayParams, services.start_ray_process,
write_ray_address, the names of the dashboard's modules.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray._private import ray_constants, services
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address

log = logging.getLogger("escala.ray_head")
LOOK_SECONDS = 1.0
HOST = "127.0.0.1"
DASHBOARD_MODULES = (
    "EventHead",
    "JobHead",  # the job server
    "NodeHead",
    "ReportHead",  # the cluster's resources, stack traces
    "ServeHead",  # the REST interface that `escala rollouts` speaks
    "StateHead",  # actors, tasks, log files
)


def start(port: int, dashboard_port: int, num_cpus: int, directory: str) -> Node:
    """Start the head's processes; returns when the GCS and the dashboard answer. Raises what Ray raises."""
    start_process = services.start_ray_process

    def start_with_fewer_modules(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            command = [*command, f"--modules-to-load={','.join(DASHBOARD_MODULES)}"]
        return start_process(command, process_type, **options)

    services.start_ray_process = start_with_fewer_modules
    # Where the job server looks for the head of its drivers: without it, it takes any that runs on the machine.
    Path(directory).mkdir(exist_ok=True)
    write_ray_address(f"{HOST}:{port}", directory)
    parameters = RayParams(
        node_ip_address=HOST,
        node_name=HOST,
        gcs_server_port=port,
        include_dashboard=True,
        dashboard_host=HOST,
        dashboard_port=dashboard_port,
        dashboard_agent_listen_port=0,  # any: the default is fixed, and a second home would collide
        min_worker_port=0,  # any: else 10002-19999, which may hold `port`
        max_worker_port=0,
        num_cpus=num_cpus,
        temp_dir=directory,
        include_log_monitor=True,  # carries workers' lines into their job's log
        no_monitor=True,
    )
    return Node(parameters, head=True, shutdown_at_exit=True, spawn_reaper=True)


def wait(node: Node) -> str:
    """Wait for the death of a child; returns which. Node ends this process on SIGTERM."""
    while not (dead := node.dead_processes()):
        time.sleep(LOOK_SECONDS)
    return ", ".join(f"{kind} (code {process.returncode})" for kind, process in dead)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process: until it is told to end, or a child of it ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--port", "--dashboard-port", "--num-cpus"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--directory", required=True, help="of Ray's sessions")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    node = start(options.port, options.dashboard_port, options.num_cpus, options.directory)
    log.info("Ray listens at %s:%d, its dashboard at %s", HOST, options.port, node.webui_url)
    log.error("ended unexpectedly: %s; the others of the head are ended too", wait(node))
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())

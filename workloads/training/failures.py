"""Why a distributed attempt failed, as one of the classes that the retry rule reads.

Ray wraps what happened on a worker several times, and the death of one worker surfaces on its peers as a
broken connection. So all causes are collected, and the most telling one wins: our own errors, then memory,
then losses of nodes and workers, then what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from escala.contract.errors import EscalaError
from escala.contract.failures import Failure, internal
from escala.contract.records import TEXT_CHARACTERS
from escala.contract.redaction import hide

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.RaySystemError,  # the head or the raylet went away under the driver
)
MEMORY_WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory", "std::bad_alloc")
PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "gloo/transport",
)
NODE_WORDS = ("node has died", "node died", "node was terminated", "its node", "The node it was running on")
PROBE_SECONDS = 10


class NodeWatch:
    """The kernel's count of processes killed for memory on every node, and which nodes are alive; taken at
    the start.

    The driver's own node is read directly; the others by a small Ray task each, which runs while workers
    start.
    """

    def __init__(self) -> None:
        self._here = ray.get_runtime_context().get_node_id()
        self._alive = _alive_nodes()
        self._before = {node: _probe(node) for node in self._alive if node != self._here}
        self._before_here = oom_kills()

    def killed_for_memory(self) -> str | None:
        """Where the kernel has killed processes since the start, with the numbers; None where it has not."""
        found = [_describe(self._here, self._before_here, oom_kills())]
        for node in self._alive & _alive_nodes() - {self._here}:
            try:
                before, after = ray.get([self._before[node], _probe(node)], timeout=PROBE_SECONDS)
            except ray.exceptions.RayError:
                continue  # the node went away meanwhile; lost_nodes() says so
            found.append(_describe(node, before, after))
        return "; ".join(text for text in found if text) or None

    def lost_nodes(self) -> set[str]:
        """Nodes that were alive at the start and are not now."""
        return self._alive - _alive_nodes()


def oom_kills() -> dict[str, int]:
    """This machine's counters: `oom_kill` since boot (and of our cgroup), `total_bytes` of memory."""
    facts = {"oom_kill": _counter(Path("/proc/vmstat"), "oom_kill")}
    facts["cgroup_oom_kill"] = _counter(Path("/sys/fs/cgroup/memory.events"), "oom_kill")
    facts["total_bytes"] = _counter(Path("/proc/meminfo"), "MemTotal:") * 1024
    return facts


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything that it wraps, outermost first, each once."""
    pending, seen = [error], set()
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner: list[Any] = list(getattr(current, "worker_failures", {}).values())
        names = (
            "controller_failure",
            "health_check_failure",
            "_base_exc",
            "cause",
            "__cause__",
            "__context__",
        )
        pending += inner + [getattr(current, name, None) for name in names]


def classify(error: BaseException, nodes: NodeWatch | None) -> Failure:
    """The failure that `error` amounts to; `nodes` is None where it happened before Ray was reached."""
    chain = list(causes(error))
    ours = [e for e in chain if isinstance(e, EscalaError)]
    if ours:
        first = ours[0]
        return Failure(first.kind, first.message, first.hint, first.exit_code)
    for one in chain:
        if _is_out_of_memory(one):
            return Failure("out_of_memory", f"a worker ran out of memory: {_said(one)}", MEMORY_HINT, 9)
    lost = next((e for e in chain if isinstance(e, LOST) or _broken_connection(e)), None)
    if nodes is not None and (lost is not None or isinstance(error, ray.exceptions.RayError)):
        killed = nodes.killed_for_memory()
        if killed:
            return Failure("out_of_memory", f"a worker was killed for memory: {killed}", MEMORY_HINT, 9)
        gone = nodes.lost_nodes()
        if gone:
            return Failure(
                "node_lost", f"the cluster lost {len(gone)} node(s) during training: {sorted(gone)}"
            )
    if any(isinstance(e, ray.exceptions.NodeDiedError) or _says(e, NODE_WORDS) for e in chain):
        return Failure("node_lost", f"a node of the cluster died during training: {_said(chain[-1])}")
    if lost is not None:
        return Failure("worker_lost", f"a worker died during training: {_said(lost)}")
    return internal(chain[-1])


MEMORY_HINT = (
    "lower training.micro_batch_sequences, set training.activation_checkpointing, "
    "or use more workers with zero_stage 3"
)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError):
        return True
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and _says(error, MEMORY_WORDS)
    )


def _broken_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _says(error, PEER_WORDS)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(word.lower() in text for word in words)


def _said(error: BaseException) -> str:
    """Its text on one line; whole, since the end of Ray's errors names the cause, up to what the database takes."""
    return hide(" ".join(str(error).split()))[:TEXT_CHARACTERS]


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _probe(node: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(oom_kills).options(scheduling_strategy=strategy).remote()


def _describe(node: str, before: dict[str, int], after: dict[str, int]) -> str:
    rise = max(after[key] - before[key] for key in ("oom_kill", "cgroup_oom_kill"))
    if rise <= 0:
        return ""
    size = after["total_bytes"] / 2**30
    return f"the kernel's oom_kill counter rose by {rise} on node {node[:8]}, which has {size:.1f} GiB"


def _counter(path: Path, key: str) -> int:
    """The number after `key` in a file of "key number" lines; 0 where there is no such file or key."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)

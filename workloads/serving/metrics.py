"""What a policy replica tells Prometheus, through Ray's metrics agent."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge

from workloads.generation.protocol import EngineStats


class Metrics:
    """Prometheus metrics of a replica; Serve adds its application, deployment and name."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(f"escala_rollouts_{name}", description)
            for name, description in {
                "running_requests": "Requests in the engine's batch.",
                "waiting_requests": "Requests that wait in the engine.",
                "queued_tokens": "Tokens that the engine's unfinished requests may still cost.",
                "tokens_per_second": "Tokens read and generated in a second of stepping, last 10 s of it.",
                "weights_version": "Version of the weights that are served; -1 where some were refused.",
                "free_cache_share": "Share of the KV cache's blocks that are free.",
            }.items()
        }
        self._counters = {
            name: Counter(f"escala_rollouts_{name}", description)
            for name, description in {
                "generated_tokens": "Tokens generated.",
                "prompt_tokens": "Tokens of prompts read, recomputed ones included.",
                "finished_requests": "Requests that have ended.",
                "preemptions": "Requests that gave up their blocks and were computed again.",
                "drafted_tokens": "Tokens drafted and scored.",
                "accepted_tokens": "Tokens drafted that became the text's.",
            }.items()
        }
        self._counted = dict.fromkeys(self._counters, 0)

    def report(self, stats: EngineStats, tokens_per_second: float, version: int) -> None:
        """The present figures."""
        values = {
            "running_requests": stats.running,
            "waiting_requests": stats.waiting,
            "queued_tokens": stats.queued_tokens,
            "tokens_per_second": tokens_per_second,
            "weights_version": version,
            "free_cache_share": stats.free_blocks / stats.total_blocks,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        counts = {
            "generated_tokens": stats.generated_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "finished_requests": stats.finished,
            "preemptions": stats.preemptions,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
        }
        for name, count in counts.items():
            if count > self._counted[name]:  # Ray's counters refuse an increase by 0
                self._counters[name].inc(count - self._counted[name])
                self._counted[name] = count

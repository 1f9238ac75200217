"""Runs in the tracker: what happened."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import ConfigDict

from escala.contract.records import RunRecord
from escala.views.base import View


class RunView(View):
    """What happened in one attempt. Losses in nats per token, on the held-out set. None: not known."""

    run_id: str | None
    job_id: str
    attempt: int
    name: str
    workload: str
    status: str
    started_at: float  # Unix seconds
    ended_at: float | None
    initial_held_out_loss_nats: float | None
    held_out_loss_nats: float | None
    held_out_bits_per_byte: float | None
    train_loss_nats: float | None
    measures: dict[str, float] | None  # what else the last evaluation found
    n_total: int | None
    n_active: int | None
    n_non_embedding: int | None
    n_trained: int | None  # fewer than n_total with LoRA
    context_tokens: int | None
    train_tokens: int | None  # seen by the model, earlier attempts included
    compute_flops: float | None  # the same
    attempt_tokens: int | None  # by this attempt alone
    attempt_flops: float | None
    wall_seconds: float | None
    peak_memory_bytes: int | None
    idle_memory_bytes: int | None
    step_seconds: float | None  # the median step's
    communication_bytes: float | None
    tokens_per_second: float | None
    model_flops_utilization: float | None
    energy_joules: float | None  # at the meter, of this attempt
    joules_per_token: float | None
    energy_source: str | None
    cost_usd: float | None
    carbon_gco2e: float | None
    workers: int | None
    seed: int | None
    config_fingerprint: str | None
    code_fingerprint: str | None
    corpus_fingerprint: str | None
    tokenizer_fingerprint: str | None
    evaluation_fingerprint: str | None
    parent_run_id: str | None
    reason: str | None


class RunDetailsView(RunView):
    """A run with its page in MLflow; None where the tracker has no pages."""

    url: str | None

    @classmethod
    def with_page(cls, record: RunRecord, url: str | None) -> RunDetailsView:
        """Of a run's record and its page."""
        return cls(**asdict(record), url=url)


class SampleView(View):
    """One response of a `ppo` run's policy."""

    model_config = ConfigDict(extra="allow")

    iteration: int
    prompt: str
    response: str
    reward: float | None
    finished: bool

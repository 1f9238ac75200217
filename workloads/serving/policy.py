"""The `policy` deployment: one engine a replica, behind the weight-version contract.

Every replica says with each response which weights it is from. It takes published weights when the responses that
have started are finished, and answers nothing after it has refused some.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from escala.contract.errors import SpecError, StaleWeights, WeightsNotLoaded
from escala.rollouts.weights import Receiver, Weights, WeightVersion, digest_of
from escala.schema.compression import BITS
from escala.schema.serve import ServeConfig
from workloads.generation.protocol import EngineProtocol, SamplingParams, completion_of, shown
from workloads.serving.governed import GovernedReplica
from workloads.serving.metrics import Metrics
from workloads.serving.records import Generated, GeneratedChunk, RequestPrompt
from workloads.serving.replica import begin, end, own_name
from workloads.serving.stepper import Stepper
from workloads.serving.tokenising import Tokenising
from workloads.serving.weights import pack, unpack

STORE = "weights"
"""The deployment actor that keeps the weight versions."""
REPORT_SECONDS = 1.0
log = logging.getLogger(__name__)


class Policy:
    """One replica."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        from workloads.model.start import load_compressed, load_model, load_tokenizer
        from workloads.serving.engine_loading import agreed_engine, build_engine, initial_version

        self.config = ServeConfig.model_validate(config)
        await begin(self.config)
        path = Path(self.config.model)
        self.tokenizer = await asyncio.to_thread(load_tokenizer, path)
        load = load_compressed if self.config.precision in BITS else load_model
        loaded = [await asyncio.to_thread(load, path)]
        digest = digest_of(pack(loaded[0].state_dict()))

        def build(kernels: str | None) -> EngineProtocol:  # it keeps its model: a second one needs another
            model = loaded.pop() if loaded else load(path)
            return build_engine(model, self.tokenizer, self.config, kernels)

        model = loaded[0].config
        engine = await agreed_engine(self._store(), self.config.kernels, build)
        initial = initial_version(digest, self.config.precision, engine)
        self.stepper = Stepper(engine)
        self.replica = GovernedReplica(self.config, model, self.stepper, self.set_capacity)
        self.prompts = Tokenising(self.tokenizer, engine.max_context_tokens)
        self._versions = {0: initial}
        self.receiver = Receiver(self._store, own_name(), self._apply, self.config.sync_seconds)
        await self.receiver.start(initial)
        self._report = asyncio.create_task(self._report_forever(Metrics()))

    async def complete(
        self,
        prompt: RequestPrompt,
        params: SamplingParams,
        min_version: int = 0,
        max_staleness: int | None = None,
        clip: bool = False,
        asked: float | None = None,
    ) -> Generated:
        """One response.

        Args:
            min_version, max_staleness: the oldest weights that it may be from; versions that they may be behind the
                newest.
            clip: lower max_tokens to what the service and the context leave, where they leave less.
            asked: when the service was, in seconds since the epoch; None: now.

        Raises SpecError where the prompt or the parameters don't fit the engine; DataError for a chat that the model's
        template refuses; StaleWeights where the bound can't be kept; WeightsNotLoaded or DigestMismatch where this
        replica has refused weights; RequestFailed for an error of this response alone; EngineStopped where another
        replica can be asked.
        """
        async with aclosing(self.stream(prompt, params, min_version, max_staleness, clip, asked)) as stream:
            chunks = [chunk async for chunk in stream]
        completion = completion_of([chunk.output for chunk in chunks])
        return Generated(completion, chunks[-1].weights, chunks[-1].prompt_tokens)

    async def stream(
        self,
        prompt: RequestPrompt,
        params: SamplingParams,
        min_version: int = 0,
        max_staleness: int | None = None,
        clip: bool = False,
        asked: float | None = None,
    ) -> AsyncGenerator[GeneratedChunk]:
        """One response in chunks. Raises as `complete`, before the first chunk or, where the engine dies, after it."""
        timing, answered = self.replica.latencies.begin(asked), False
        try:
            await self.receiver.require(min_version, max_staleness)
            tokens = await self.prompts.tokens(prompt)
            params = self._limit(params, len(tokens), clip)
            async for chunk in self._chunks(tokens, params, min_version):
                self.replica.latencies.token(timing)
                yield chunk
            answered = True
        finally:
            self.replica.latencies.end(timing, answered)

    async def _chunks(
        self, tokens: list[int], params: SamplingParams, min_version: int
    ) -> AsyncGenerator[GeneratedChunk]:
        async with aclosing(self.stepper.outputs(tokens, params)) as outputs:
            async for output in outputs:
                if output.weights_version < min_version:
                    raise StaleWeights(
                        f"The response is from version {output.weights_version}, not {min_version} or newer.",
                        "This is an error of the engine: please report it.",
                    )
                yield GeneratedChunk(output, self._versions[output.weights_version], len(tokens))

    def _limit(self, params: SamplingParams, prompt_tokens: int, clip: bool) -> SamplingParams:
        most = self.config.engine.max_response_tokens
        if clip:
            room = self.stepper.engine.max_context_tokens - prompt_tokens
            return replace(params, max_tokens=max(1, min(params.max_tokens, most, room)))
        if params.max_tokens > most:
            raise SpecError(
                f"{shown(params.max_tokens)} tokens are asked for; this service gives {most} at most.",
                "Ask for fewer, or raise engine.max_response_tokens.",
            )
        return params

    async def describe(self) -> dict[str, Any]:
        """The model's name, the engine's context, the weights that this replica serves, the requests that it runs."""
        return {
            "name": self.config.name or self.config.model.rstrip("/").rpartition("/")[2],
            "precision": self.config.precision,
            "kernels": self.stepper.engine.kernels,
            "weight_bytes": self.stepper.stats.weight_bytes,
            "max_context_tokens": self.stepper.engine.max_context_tokens,
            "weights": self.receiver.current,
            "started": self.stepper.stats.started,
            "pid": os.getpid(),
        }

    async def set_capacity(self, factor: float | None) -> WeightVersion:
        """Serve the same weights at another capacity factor, as a newer version on every replica; None: nothing is
        dropped. The version. Replicas take it one after another, their responses finished first.

        Raises SpecError where this engine cannot serve it, and as `Store.set_capacity`.
        """
        self.stepper.engine.check_capacity_factor(factor)
        version: WeightVersion = await self._store().set_capacity.remote(factor)
        return version

    async def weights_store(self) -> Any:
        """The store actor, to publish to."""
        return self._store()

    async def check_health(self) -> None:
        """Serve replaces the replica where this raises."""
        self.stepper.check()
        if self.receiver.failure is not None:
            raise self.receiver.failure

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy reads (`escala.rollouts.serve_hook`: METRICS, READINGS)."""
        stats = self.stepper.stats
        return {
            "running_requests": float(stats.running),
            "waiting_requests": float(stats.waiting),
            "queued_tokens": float(stats.queued_tokens),
            "tokens_per_second": self.stepper.tokens_per_second,
            **self.replica.figures(),
        }

    async def __del__(self) -> None:
        """Serve calls this once when the replica leaves, its requests finished."""
        if hasattr(self, "_report"):
            self._report.cancel()
            await self.replica.leave()
            await self.receiver.stop()
            await self.stepper.close()
            self.prompts.close()
        await end(self.config)

    async def _apply(self, version: WeightVersion, weights: Weights | None) -> None:
        served = self._versions[0].precision
        if version.precision != served:
            raise WeightsNotLoaded(
                f"Version {version.version} is of precision {version.precision}; this deployment serves {served}.",
                "Publish for what is served, or start a deployment for it.",
            )
        kernels = self.stepper.engine.kernels
        if version.kernels not in (None, kernels):
            raise WeightsNotLoaded(
                f"Version {version.version} is for the kernels {version.kernels}; this deployment has {kernels}.",
                "Publish for what is served, or start a deployment with `kernels` set to those.",
            )
        self._versions[version.version] = replace(version, kernels=kernels)
        state = None if weights is None else unpack(weights)
        await self.stepper.load(state, version.version, version.capacity_factor)
        for old in sorted(self._versions)[
            1:-2
        ]:  # 0 for what is served; the last two for responses on their way
            del self._versions[old]

    def _store(self) -> Any:
        return serve.get_deployment_actor(STORE)

    async def _report_forever(self, metrics: Metrics) -> None:
        while True:
            failed = self.receiver.failure is not None
            metrics.report(
                self.stepper.stats,
                self.stepper.tokens_per_second,
                -1 if failed else self.receiver.current.version,
            )
            try:
                await self.replica.obey()
            except Exception:
                log.exception("the governor's targets were not taken; they are tried again")
            await asyncio.sleep(REPORT_SECONDS)

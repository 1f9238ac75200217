"""Reinforcement learning from human or AI feedback: `python -m workloads.ppo ATTEMPT.json` (SPEC.md C; Schulman et al.
2017; Ziegler et al. 2019).

An iteration: publish the actor's weights -> every rank draws its share of the responses from the job's own rollout
service -> rewards -> log-probabilities of actor and reference, values -> advantages -> epochs of minibatches.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from escala.contract.checkpoints import file_sha256
from escala.contract.errors import DataError, Diverged, EscalaError
from escala.contract.records import SAMPLES, AttemptSpec
from escala.schema import PpoConfig
from escala.schema.flops import ppo_flops_per_token
from escala.storage.checkpoints import Checkpoint, checkpoint_at
from escala.tracking.lineage import fingerprint
from workloads.alignment import measures
from workloads.alignment.critic import build_critic
from workloads.alignment.kl import ProportionalKL, ThresholdKL
from workloads.alignment.learner import (
    Learner,
    Updates,
    critic_training,
    estimate,
    exchange,
    policy_weights,
)
from workloads.alignment.microbatches import Rows
from workloads.alignment.rollouts import (
    Drawing,
    Response,
    Scoring,
    Service,
    load_prompts,
    read_prompts,
    save_prompts,
)
from workloads.alignment.token_rewards import RunningMoments, length_penalty, missing_eos_penalty
from workloads.data.cache import check_directory, is_stored, new_directory
from workloads.model.start import load_tokenizer
from workloads.training import finetune, zero
from workloads.training.driver import WorkerInputs
from workloads.training.loop import STOP_CODES, Trainer, seed_step
from workloads.training.run import Prepared, main
from workloads.training.schedule import learning_rate
from workloads.training.task import Evaluation

T = TypeVar("T")


def prepare(spec: AttemptSpec, config: PpoConfig) -> Prepared:
    """Prompts, tokenised and stored by content. Raises DataError."""
    tokenizer, file, root = finetune.open_tokenizer(config), Path(config.prompts), Path(spec.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.model.vocab_size}.",
            "Use the tokenizer that the model was trained with.",
        )
    _check_critic(config, tokenizer.fingerprint)
    most = config.context_tokens - config.sampling.max_response_tokens
    prompts = read_prompts(file, tokenizer, most)
    directory = root / "prompts" / fingerprint([file_sha256(file), most, tokenizer.identity])
    if not is_stored(directory):
        with new_directory(directory) as new:
            save_prompts(prompts, new)
    kept = finetune.store_tokenizer(tokenizer, root)
    rewards = [section.model_dump(mode="json") for section in config.rewards]
    fingerprints = {
        "corpus": fingerprint([prompt.tokens for prompt in prompts]),
        "tokenizer": tokenizer.fingerprint,
        "evaluation": fingerprint([rewards, tokenizer.fingerprint]),
    }
    return Prepared(str(directory), kept, fingerprints)


def _check_critic(config: PpoConfig, tokenizer: str) -> None:
    """Raise DataError for a critic that reads other tokens than the actor."""
    start = None if config.critic is None else config.critic.start
    if start is None or start.path is None:
        return
    if load_tokenizer(Path(start.path)).fingerprint != tokenizer:
        raise DataError(
            f"The critic at {start.path} has another tokenizer than the actor.",
            "Train the reward model from the same base, or leave critic.start out.",
        )


def beside(inputs: WorkerInputs) -> AbstractContextManager[None]:
    """What runs while the workers do (training.run.Entry): the job's rollout service."""
    from workloads.sidecar import rollout_service

    return rollout_service(inputs.spec, inputs.config)


def make_trainer(inputs: WorkerInputs, on_evaluation: Callable[[int, Evaluation], None] | None = None) -> Ppo:
    """One worker's part (training.run.Entry)."""
    from workloads.serving.client import Rollouts
    from workloads.sidecar import application_name

    seconds = inputs.config.rollouts.timeout_seconds
    service = Rollouts(application_name(inputs.spec), timeout_seconds=seconds)
    return Ppo(inputs, service, on_evaluation)


class Ppo(Trainer):
    """One rank of a run; its steps are iterations. Raises Diverged, CheckpointError, Superseded, what rewards and the
    rollout service raise (on every rank, after a checkpoint).
    """

    config: PpoConfig

    def __init__(
        self,
        inputs: WorkerInputs,
        service: Service,
        on_evaluation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        self.service = service
        self.scores, self.kl_coef = RunningMoments(), inputs.config.kl.coefficient
        self.measures: dict[str, float] = {}  # of the last iteration
        self.seconds: dict[str, float] = {}  # of its phases
        self.samples: list[list[Any]] = []
        self.saved_step = 0
        self.in_flight: Future[list[Response]] | None = None
        self.background = ThreadPoolExecutor(1, "rollouts")
        super().__init__(inputs, lambda given: None, on_evaluation)

    def _build(self) -> None:
        """Actor, critic and reference, the same on every rank; optimisers with empty moments, since the actor's may be
        saved before its first update.
        """
        config, training = self.config, self.config.training
        torch.manual_seed(training.seed)
        model = finetune.build_model(config)
        reference = None
        if config.lora is None:
            dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
            reference = copy.deepcopy(model).to(self.device, dtype).requires_grad_(False).eval()
        critic = None if config.critic is None else build_critic(config)
        self.engine = zero.make_engine(model, training, 1, 1)
        self.critic = None if critic is None else zero.make_engine(critic, critic_training(config), 1, 1)
        for engine in (self.engine, *self.engines_beside().values()):
            zero.begin_restore(engine, 0)
        self.learner = Learner(config, self.engine, self.critic, reference)
        self._count_parameters()
        check_directory(Path(self.inputs.prepared))
        prompts = load_prompts(Path(self.inputs.prepared))
        self.drawing = Drawing(config, prompts, self.rank, self.ranks)
        self.scoring = Scoring(config)

    def engines_beside(self) -> dict[str, Any]:
        """See Trainer."""
        return {} if self.critic is None else {"critic": self.critic}

    def own_state(self) -> dict[str, Any]:
        """See Trainer: what an iteration depends on beside weights, moments and its number."""
        state = {"kl_coef": self.kl_coef, "scores": asdict(self.scores), "measures": self.measures}
        return {"ppo": state}

    def _restore(self) -> None:
        super()._restore()
        self.saved_step = self.count.step
        if self.inputs.checkpoint is None:
            return
        found = checkpoint_at(self.inputs.checkpoint)
        self.kl_coef = found.part("ppo.kl_coef", float)
        self.scores = RunningMoments(**found.part("ppo.scores", dict))
        self.measures = found.part("ppo.measures", dict)

    def _step(self) -> str | None:
        """One iteration; or, before it, the reason not to make it."""
        config, iteration = self.config, self.count.step
        stop = self._asked_to_stop()
        if stop is not None:
            return stop
        self.throughput.begin_step()
        seed_step(config.training.seed * 1_000_003 + iteration, self.device)
        with self._phase("rollouts"):
            responses = self._responses(iteration)
        with self._phase("rewards"):
            scores = self._together(lambda: self.scoring.score(self.service, responses))
            scores_B = torch.tensor(scores.sums)
        with self._phase("assessment"):
            mine, entropies = self._assess(responses, scores_B)
            self.measures |= measures.of_responses(
                mine, responses, scores, entropies, self.count.step + 1, self.device
            )
            everyone = exchange(mine, config.batch.prompts, config.batch.responses_per_prompt)
        rate = learning_rate(iteration, config)
        zero.set_learning_rate(self.engine, rate)
        if self.critic is not None and config.critic is not None:
            zero.set_learning_rate(
                self.critic, rate * config.critic.learning_rate / config.training.optimizer.learning_rate
            )
        frozen = config.critic is not None and iteration < config.critic.warmup_iterations
        with self._phase("learning"):
            updates = self.learner.update(everyone, iteration, self.kl_coef, frozen)
        self._advance(everyone, updates, frozen)
        self._report_iteration(everyone, updates, rate)
        self._steer()
        self._take_samples(iteration, responses, scores_B)
        return None

    def _asked_to_stop(self) -> str | None:
        """What rank 0 saw, on every rank."""
        stop = None
        if self.rank == 0:
            stop = self.watch.poll(self.count.attempt_flops, self.flops * self.config.step_tokens)
        code = torch.tensor(STOP_CODES.index(stop), device=self.device)
        torch.distributed.broadcast(code, src=0)
        return STOP_CODES[int(code)]

    def _responses(self, iteration: int) -> list[Response]:
        """This rank's responses of `iteration`: drawn now, or, one step off, while the last one was learned from."""
        drawn = None
        if self.in_flight is not None:  # before the next weights: a response is of one version
            in_flight, self.in_flight = self.in_flight, None
            drawn = self._together(in_flight.result)
        version = iteration + 1  # 0 is what the service was started with
        self._publish(version)
        if drawn is None:
            drawn = self._together(lambda: self.drawing.draw(self.service, iteration, version))
        if self.config.mode == "one_step_off" and iteration + 1 < self.config.total_steps:
            self.in_flight = self.background.submit(self.drawing.draw, self.service, iteration + 1, version)
        return drawn

    def _publish(self, version: int) -> None:
        """Make the actor's weights those of the service."""
        weights = policy_weights(self.engine)
        seconds = self.config.rollouts.timeout_seconds

        def publish() -> None:
            if self.rank == 0:
                self.service.publish(weights, version, timeout_seconds=seconds)

        self._together(publish)

    def _together(self, work: Callable[[], T]) -> T:
        """`work` on every rank. Where it fails on one, all keep what they have in a checkpoint and raise its error."""
        result, failure = None, None
        try:
            result = work()
        except EscalaError as error:
            failure = error
        failures: list[EscalaError | None] = [None] * self.ranks
        torch.distributed.all_gather_object(failures, failure)
        first = next((found for found in failures if found is not None), None)
        if first is None:
            return result  # type: ignore[return-value]
        if self.count.step > self.saved_step:
            self._save()
        raise first

    def _assess(self, responses: list[Response], scores_B: Tensor) -> tuple[Rows, float]:
        """This rank's rows with all that the updates need, and the sum of the policy's entropies."""
        rows = rows_of(responses)
        columns, after_B, entropies = self.learner.assess(rows)
        rows.columns.update(columns)
        finished_B = torch.tensor([one.finished for one in responses])
        groups_B = torch.tensor([one.slot for one in responses])
        after_B = after_B.masked_fill(finished_B, 0.0)
        self._check_kl(rows)
        shaped_B = self._shape(scores_B, finished_B, rows.response_lengths_B)
        rows.columns.update(estimate(self.config, rows, shaped_B, groups_B, after_B, self.kl_coef))
        return rows, entropies

    def _shape(self, scores_B: Tensor, finished_B: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores as rewards: normalised, clipped, penalties taken off."""
        section, most = self.config.shaping, self.config.sampling.max_response_tokens
        self.scores.update(scores_B)
        if section.normalise:
            scores_B = self.scores.normalise(scores_B)
        if section.clip is not None:
            scores_B = scores_B.clamp(-section.clip, section.clip)
        scores_B = missing_eos_penalty(scores_B, finished_B, section.missing_eos_penalty)
        if not section.length_penalty:
            return scores_B
        return length_penalty(scores_B, lengths_B, section.length_free_tokens, most, section.length_penalty)

    def _check_kl(self, rows: Rows) -> None:
        """Raise Diverged where the policy is further from its reference than the stated limit."""
        self.measures = measures.of_reference(rows, self.device)
        found, limit = self.measures["kl_k1_nats_per_token"], self.config.kl.limit_nats_per_token
        if not found <= limit:
            raise Diverged(
                f"before update {self.count.step + 1} the policy is {found:.3g} nats a token from its "
                f"reference, above kl.limit_nats_per_token {limit:g}",
                "raise kl.coefficient, lower the learning rate, or raise the limit; a checkpoint from before is kept",
            )

    def _advance(self, rows: Rows, updates: Updates, frozen: bool) -> None:
        """Count what the iteration took."""
        count, tokens = self.count, sum(rows.lengths)
        epochs = updates.steps / self.config.batch.minibatches
        flops = tokens * ppo_flops_per_token(self.config, epochs, frozen)
        self.throughput.end_step(tokens)
        count.step += 1
        count.train_tokens += tokens
        count.attempt_tokens += tokens
        count.compute_flops += flops
        count.attempt_flops += flops

    def _steer(self) -> None:
        """The next iteration's KL coefficient."""
        section, found = self.config.kl, self.measures["kl_nats"]
        if section.target_nats is None or section.controller == "fixed":
            return
        if section.controller == "threshold":
            self.kl_coef = ThresholdKL(self.kl_coef, section.target_nats).update(found)
        else:
            controller = ProportionalKL(self.kl_coef, section.target_nats, section.horizon_episodes)
            self.kl_coef = controller.update(found, self.config.training.batch_sequences)

    def _report_iteration(self, rows: Rows, updates: Updates, rate: float) -> None:
        if self.reporter is None:
            return
        count, speed = self.count, self.throughput.recent
        if count.step % self.config.training.log_every_steps == 0 or count.step == self.config.total_steps:
            self.reporter.metrics(
                count.step,
                {
                    **self.measures,
                    **measures.of_work(rows, updates, self.config.batch.minibatches, self.seconds),
                    "kl_coef": self.kl_coef,
                    "learning_rate": rate,
                    "tokens_per_second": speed,
                    "model_flops_utilization": self._utilization(speed),
                    "train_tokens": count.train_tokens,
                },
            )
            print(
                f"iteration {count.step}: reward {self.measures['reward']:.4f}, KL {self.measures['kl_nats']:.4f} "
                f"nats, {self.measures['response_tokens']:.1f} tokens",
                flush=True,
            )
        self._progress(force=count.step == self.config.total_steps)

    def _take_samples(self, iteration: int, responses: list[Response], scores_B: Tensor) -> None:
        """A few of rank 0's responses with their rewards, for people."""
        last = self.count.step == self.config.total_steps
        if self.reporter is None or not (last or iteration % self.config.samples_every_iterations == 0):
            return
        self.samples += measures.samples(iteration, responses, scores_B)
        self.samples = self.samples[-measures.SAMPLES_KEPT :]
        self.reporter.table(SAMPLES, measures.SAMPLE_COLUMNS, self.samples)

    def _evaluate(self) -> Evaluation:
        """What the last iteration's responses were worth; there is no held-out loss."""
        result = Evaluation({}, self.measures)
        self._tell(measures=result.measures)
        if self.on_evaluation is not None and self.measures:
            self.on_evaluation(self.count.step, result)
        return result

    def _save(self) -> Checkpoint:
        saved = super()._save()
        self.saved_step = saved.step
        return saved

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def close(self) -> None:
        """Deliver what is buffered; wait for nothing that is in flight."""
        self.background.shutdown(wait=False, cancel_futures=True)
        super().close()


def rows_of(responses: list[Response]) -> Rows:
    """Prompts with their responses, and the engine's log-probabilities."""
    width = max(len(one.tokens) for one in responses)
    engine_BT = torch.tensor(
        [one.engine_logprobs + [0.0] * (width - len(one.tokens)) for one in responses], dtype=torch.float32
    )
    return Rows(
        [one.prompt_tokens + one.tokens for one in responses],
        [len(one.prompt_tokens) for one in responses],
        {"engine_logp": engine_BT},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

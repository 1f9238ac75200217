"""An iteration of PPO as a step of the run loop: responses -> rewards -> log-probabilities of actor and reference,
values -> advantages -> epochs of minibatches (docs/theory C; Schulman et al. 2017; Ziegler et al. 2019).

Dimensions: B responses of this rank, T response tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escala.contract.errors import Diverged
from escala.contract.records import SAMPLES
from escala.schema import PpoConfig
from escala.schema.flops import step_flops_per_token
from escala.storage.checkpoints import Checkpoint
from workloads.alignment import measures
from workloads.alignment.critic import build_critic
from workloads.alignment.kl import ProportionalKL, ThresholdKL
from workloads.alignment.learner import Learner, critic_training, estimate, exchange
from workloads.alignment.microbatches import RolloutBatch
from workloads.alignment.pipeline import RolloutPipeline
from workloads.alignment.rollouts import Response, RolloutService, Scores, Scoring, load_prompts
from workloads.alignment.shaping import ScoreShaping
from workloads.alignment.token_rewards import RunningMoments
from workloads.data.cache import check_directory
from workloads.training import finetune, zero
from workloads.training.agreement import on_all_ranks
from workloads.training.device import device_of
from workloads.training.entry import WorkerInputs
from workloads.training.report import Reporter
from workloads.training.schedule import learning_rate
from workloads.training.step import Counters, StepResult
from workloads.training.task import Evaluation


class PpoStep:
    """One rank's part of a run's iterations (training.step.Step). What rewards and the rollout service raise, it raises
    as AgreedError.
    """

    engine: Any  # of the actor
    critic: Any | None

    def __init__(self, inputs: WorkerInputs[PpoConfig], service: RolloutService) -> None:
        self.config, self.prepared, self.service = inputs.config, Path(inputs.prepared), service
        self.device = device_of(self.config.resources)
        self.shaping, self.kl_coef = ScoreShaping(self.config), self.config.kl.coefficient
        self.measures: dict[str, float] = {}  # of the last iteration
        self.metrics: dict[str, float | None] = {}  # these, and those of its work
        self.seconds: dict[str, float] = {}  # of its phases
        self.samples: list[list[Any]] = []  # a few responses with their rewards; people see rank 0's

    def build(self) -> None:
        """See Step: actor, critic and reference; optimisers with empty moments, since the actor's may be saved before
        its first update.
        """
        config, training = self.config, self.config.training
        model = finetune.build_model(config)
        reference = None
        if config.lora is None:
            dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
            reference = copy.deepcopy(model).to(self.device, dtype).requires_grad_(False).eval()
        critic = None if config.critic is None else build_critic(config)
        self.engine = zero.make_engine(model, training, 1, 1)
        self.critic = None if critic is None else zero.make_engine(critic, critic_training(config), 1, 1)
        for engine in (self.engine, *self.other_engines().values()):
            zero.begin_restore(engine, 0)
        self.learner = Learner(config, self.engine, self.critic, reference)
        check_directory(self.prepared)
        self.rollouts = RolloutPipeline(config, self.service, self.engine, load_prompts(self.prepared))
        self.scoring = Scoring(config)

    def other_engines(self) -> dict[str, Any]:
        """See Step."""
        return {} if self.critic is None else {"critic": self.critic}

    def state(self) -> dict[str, Any]:
        """See Step."""
        moments = asdict(self.shaping.moments)
        return {"ppo": {"kl_coef": self.kl_coef, "scores": moments, "measures": self.measures}}

    def restore(self, found: Checkpoint) -> None:
        """See Step."""
        self.kl_coef = found.part("ppo.kl_coef", float)
        self.shaping.moments = RunningMoments(**found.part("ppo.scores", dict))
        self.measures = found.part("ppo.measures", dict)

    def begin(self, step: int) -> int:
        """See Step: the most tokens that an iteration reads."""
        return self.config.step_tokens

    def run(self, count: Counters) -> StepResult:
        """See Step: one iteration."""
        config, iteration = self.config, count.step
        with self._phase("rollouts"):
            responses = self.rollouts.responses(iteration)
        with self._phase("rewards"):
            scores = on_all_ranks(lambda: self.scoring.score(self.service, responses))
        with self._phase("assessment"):
            mine = self._assess(iteration, responses, scores)
            everyone = exchange(mine, config.batch.prompts, config.batch.responses_per_prompt)
        rate, frozen = self._set_learning_rates(iteration)
        with self._phase("learning"):
            updates = self.learner.update(everyone, iteration, self.kl_coef, frozen)
        self.metrics = {
            **self.measures,
            **measures.of_work(everyone, updates, config.batch.minibatches, self.seconds),
            **measures.of_rollouts(responses, self.device),
            "kl_coef": self.kl_coef,
            "learning_rate": rate,
        }
        self._update_kl_coefficient()
        self._take_samples(iteration, responses, scores)
        epochs = updates.steps / config.batch.minibatches
        return StepResult(sum(everyone.lengths), step_flops_per_token(config, epochs, frozen))

    def _assess(self, iteration: int, responses: list[Response], scores: Scores) -> RolloutBatch:
        """This rank's rows with all that the updates need."""
        rows, scores_B = batch_of(responses), torch.tensor(scores.sums)
        columns, after_B, entropies = self.learner.assess(rows)
        rows.columns.update(columns)
        finished_B = torch.tensor([one.finished for one in responses])
        groups_B = torch.tensor([one.slot for one in responses])
        after_B = after_B.masked_fill(finished_B, 0.0)
        self.measures = measures.of_reference(rows, self.device)
        self._check_kl(iteration)
        shaped_B = self.shaping.shape(scores_B, finished_B, rows.response_lengths_B)
        rows.columns.update(estimate(self.config, rows, shaped_B, groups_B, after_B, self.kl_coef))
        self.measures |= measures.of_responses(rows, responses, scores, entropies, iteration + 1, self.device)
        return rows

    def _check_kl(self, iteration: int) -> None:
        """Raise Diverged where the policy is further from its reference than the stated limit."""
        found, limit = self.measures["kl_k1_nats_per_token"], self.config.kl.limit_nats_per_token
        if not found <= limit:
            raise Diverged(
                f"before update {iteration + 1} the policy is {found:.3g} nats a token from its "
                f"reference, above kl.limit_nats_per_token {limit:g}",
                "raise kl.coefficient, lower the learning rate, or raise the limit; a checkpoint from before is kept",
            )

    def _set_learning_rates(self, iteration: int) -> tuple[float, bool]:
        """Of actor and critic. Returns the actor's, and whether it waits for the critic to warm up."""
        config, rate = self.config, learning_rate(iteration, self.config)
        zero.set_learning_rate(self.engine, rate)
        if self.critic is None or config.critic is None:
            return rate, False
        critic_rate = rate * config.critic.learning_rate / config.training.optimizer.learning_rate
        zero.set_learning_rate(self.critic, critic_rate)
        return rate, iteration < config.critic.warmup_iterations

    def _update_kl_coefficient(self) -> None:
        """The next iteration's."""
        section, found = self.config.kl, self.measures["kl_nats"]
        if section.target_nats is None or section.controller == "fixed":
            return
        if section.controller == "threshold":
            self.kl_coef = ThresholdKL(self.kl_coef, section.target_nats).update(found)
        else:
            controller = ProportionalKL(self.kl_coef, section.target_nats, section.horizon_episodes)
            self.kl_coef = controller.update(found, self.config.training.batch_sequences)

    def _take_samples(self, iteration: int, responses: list[Response], scores: Scores) -> None:
        if self._samples(iteration):
            self.samples += measures.samples(iteration, responses, torch.tensor(scores.sums))
            self.samples = self.samples[-measures.SAMPLES_KEPT :]

    def _samples(self, iteration: int) -> bool:
        """Whether a few of the iteration's responses are kept for people."""
        is_last = iteration + 1 == self.config.total_steps
        return is_last or iteration % self.config.samples_every_iterations == 0

    def report(self, step: int, is_logged: bool, reporter: Reporter | None) -> None:
        """See Step."""
        if reporter is None:
            return
        if is_logged:
            reporter.metrics(step, self.metrics)
            print(
                f"iteration {step}: reward {self.measures['reward']:.4f}, KL {self.measures['kl_nats']:.4f} "
                f"nats, {self.measures['response_tokens']:.1f} tokens",
                flush=True,
            )
        if self._samples(step - 1):
            reporter.table(SAMPLES, measures.SAMPLE_COLUMNS, self.samples)

    def evaluate(self) -> Evaluation:
        """See Step: what the last iteration's responses were worth; there is no held-out loss."""
        return Evaluation({}, self.measures, is_reported=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def close(self) -> None:
        """See Step."""
        self.rollouts.close()


def batch_of(responses: list[Response]) -> RolloutBatch:
    """Prompts with their responses, and the engine's log-probabilities."""
    width = max(len(one.tokens) for one in responses)
    engine_BT: Tensor = torch.tensor(
        [one.engine_logprobs + [0.0] * (width - len(one.tokens)) for one in responses], dtype=torch.float32
    )
    return RolloutBatch(
        [one.prompt_tokens + one.tokens for one in responses],
        [len(one.prompt_tokens) for one in responses],
        {"engine_logp": engine_BT},
    )

"""Direct preference optimisation: `python -m workloads.dpo ATTEMPT.json` (Rafailov et al. 2023; docs/theory C.9).

The reference is the start: with LoRA the model without its deltas, else a frozen copy on every rank.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor

from escala.contract.records import AttemptSpec
from escala.schema import DpoConfig
from workloads.alignment.calibration import accuracy
from workloads.alignment.losses import dpo_loss
from workloads.data.batches import Batch
from workloads.model.lora import without_lora
from workloads.model.transformer import Transformer
from workloads.training import finetune
from workloads.training.entry import Entry, Prepared, WorkerInputs, supervised
from workloads.training.evaluate import held_out_rows
from workloads.training.loss import log_probabilities
from workloads.training.run import main
from workloads.training.task import Evaluation, on_device


def prepare(spec: AttemptSpec, config: DpoConfig) -> Prepared:
    """Pairs, tokenised. Raises DataError."""
    return finetune.prepare_pairs(spec, config, finetune.answered)


def make_task(inputs: WorkerInputs[DpoConfig]) -> DirectPreference:
    """The task of one worker."""
    return DirectPreference(inputs)


class DirectPreference(finetune.PairBatches[DpoConfig]):
    """-log sigmoid of the difference of two implied rewards (training.task.Task)."""

    def __init__(self, inputs: WorkerInputs[DpoConfig]) -> None:
        super().__init__(inputs)
        self.reference: Transformer | None = None

    def build(self) -> Transformer:
        """See Task. The reference stays what the policy was at the run's very first step: a checkpoint comes later."""
        model = finetune.build_model(self.config)
        if self.config.lora is None:
            dtype = torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32
            device = "cuda" if self.config.resources.gpus_per_worker else "cpu"
            self.reference = copy.deepcopy(model).to(device, dtype).requires_grad_(False).eval()
        return model

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """See Task."""
        policy, reference = self.log_probabilities(engine, batch)
        return dpo_loss(*policy, *reference, self.config.beta_dpo) * len(policy[0])

    def log_probabilities(
        self, engine: Any, batch: Batch
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(chosen, rejected) of the policy, and of the reference: log p of whole responses, each (B,)."""
        with torch.no_grad():
            if self.reference is not None:
                reference = response_log_probabilities(self.reference, batch)
            else:
                with without_lora(engine.module):
                    reference = response_log_probabilities(engine, batch)
        return finetune.halves(response_log_probabilities(engine, batch)), finetune.halves(reference)

    def evaluate(self, engine: Any) -> Evaluation:
        """Held-out loss per pair, and how often and by how much the implied reward prefers the chosen one."""

        def rows(indices: list[int]) -> Tensor:
            policy, reference = self.log_probabilities(
                engine, on_device(self.batch(self.held_out, indices), engine.device)
            )
            return torch.stack([*policy, *reference], dim=1)

        size, beta = self.config.micro_batch_sequences, self.config.beta_dpo
        policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B = held_out_rows(
            engine, len(self.held_out), size, rows
        ).unbind(1)
        chosen_B, rejected_B = (
            beta * (policy_chosen_B - ref_chosen_B),
            beta * (policy_rejected_B - ref_rejected_B),
        )
        loss = float(dpo_loss(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, beta))
        measures = {
            "held_out_accuracy": float(accuracy(chosen_B, rejected_B)),
            "held_out_reward_margin": float((chosen_B - rejected_B).mean()),
        }
        return Evaluation({"held_out_loss_nats": loss}, measures)


def response_log_probabilities(model: Any, batch: Batch) -> Tensor:
    """log p of each row's answer, summed over its tokens, shape (rows,), fp32."""
    answers_BT = batch["answers_BT"]
    logits_NV = model(batch["tokens_BT"], at_BT=answers_BT)
    logp_N = log_probabilities(logits_NV, batch["targets_BT"][answers_BT])
    logp_BT = torch.zeros(answers_BT.shape, dtype=logp_N.dtype, device=logp_N.device)
    return logp_BT.masked_scatter(answers_BT, logp_N).sum(dim=1)


ENTRY = Entry(prepare, supervised(make_task))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

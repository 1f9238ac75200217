"""What `escala compress` does to a small model: sensitivities, budgets that are kept, a checkpoint (E.6)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from escala.contract.errors import CheckpointError, SpecError, ToleranceNotMet
from escala.contract.records import AttemptSpec, Rates
from escala.schema import CompressConfig, ModelConfig, MoEConfig
from escala.schema.compression import MatrixChoice
from escala.storage.checkpoints import checkpoint_at, open_checkpoints
from tests.numerics.small_tokenizers import byte_level, write
from workloads.export import export
from workloads.model.compression.budget import BudgetSearch, LossIncrease
from workloads.model.compression.cost import ServedCost
from workloads.model.compression.groups import Candidate, groups
from workloads.model.compression.layers import CompressedMatrix, compress, compress_model, matrices
from workloads.model.compression.low_rank import truncate
from workloads.model.compression.saved import save_compressed
from workloads.model.compression.sensitivity import CompressedLoss, Shelf, untied
from workloads.model.start import load_compressed, load_model
from workloads.model.transformer import Transformer
from workloads.training.compression import Compression
from workloads.training.energy import RATES_TAG

MIXTURE = {"experts": 4, "chosen": 2, "capacity_factor": None}


def _config(moe: dict[str, Any] | None = None) -> ModelConfig:
    return ModelConfig(vocab_size=64, n_layers=2, d_model=64, n_heads=2, max_context_tokens=16, moe=moe)


class _Told:
    """In place of the reporter."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.tables: dict[str, list[list[Any]]] = {}
        self.texts: dict[str, str] = {}

    def table(self, path: str, columns: list[str], rows: list[list[Any]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables[path] = rows

    def text(self, path: str, content: str) -> None:
        self.texts[path] = content

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def facts(self, **values: Any) -> None:
        self.found |= values


def _compressed(model: Transformer, tmp_path: Path, **asked: Any) -> tuple[_Told, Compression]:
    values = {
        "start": {"path": "/m"},
        "model": model.config,
        "tokens": 128,
        "context_tokens": 16,
        "rounds": 3,
        **asked,
    }
    config = CompressConfig(**values)
    told, store = _Told(), tmp_path / "checkpoints"
    (store / "tokenizer").mkdir(parents=True)
    spec = AttemptSpec(
        "j", 1, "n", "compress", "e", config.model_dump(mode="json"), "", str(store), "", "", "",
        tags={RATES_TAG: json.dumps(vars(Rates("c", None, None, 1.0, None, 1e-12, 1e-11)))},
    )  # fmt: skip
    tokens = torch.randint(model.config.vocab_size, (16, 17), generator=torch.Generator().manual_seed(1))
    job = Compression(config, spec, model, tokens, told, {"tokenizer": "t"})  # type: ignore[arg-type]
    return told, job


def test_groups_hold_matrices_that_are_alike() -> None:
    torch.manual_seed(0)
    names = matrices(Transformer(_config(MIXTURE)))
    for some in ("*.experts.gate.*", "*.experts.*.1"):
        with pytest.raises(SpecError, match="Keep all of a mixture's experts, or none"):
            groups(names, keep=[some])
    found = groups(names, keep=["blocks.0.attention.*"])
    assert [group.name for group in found] == [
        "blocks.0.feed_forward.experts.gate+up", "blocks.0.feed_forward.experts.down",
        "blocks.1.attention.query+key", "blocks.1.attention.value+output",
        "blocks.1.feed_forward.experts.gate+up", "blocks.1.feed_forward.experts.down", "unembedding",
    ]  # fmt: skip
    assert (found[0].layer, found[-1].layer, len(found[0].matrices)) == (0, None, 8)
    assert not Candidate(4).is_served(found[-1])
    assert Candidate(4).is_served(found[0])
    assert not Candidate(5).is_served(found[0])


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_a_sensitivity_is_the_loss_of_a_model_that_is_stored_so(moe: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    model = Transformer(_config(moe))
    tokens = torch.randint(64, (6, 17))
    loss = CompressedLoss(untied(model), tokens)
    found, config = groups(loss.weights), CompressConfig(start={"path": "/m"}, model=model.config)
    kinds = [Candidate(3), Candidate(rank_share=0.125)]

    def store(name: str, candidate: Candidate) -> Any:
        shape = loss.weights[name].shape
        return compress(loss.weights[name], candidate.choice((shape[0], shape[1]), config))

    increases = loss.increases(found, kinds, store)
    for group, row in zip(found, increases, strict=True):
        for candidate, increase in zip(kinds, row, strict=True):
            alone = untied(model)
            choices = {n: candidate.choice(tuple(loss.weights[n].shape), config) for n in group.matrices}
            mixture = {n.rpartition(".")[0].rpartition(".")[0] for n in choices if n[-1].isdecimal()}
            if mixture:  # of experts all are stored or none: the others as nearly as may be
                continue
            compress_model(alone, choices)
            assert CompressedLoss(alone, tokens).loss() - loss.loss() == pytest.approx(increase, abs=1e-5)
    assert loss.loss() == pytest.approx(CompressedLoss(untied(model), tokens).loss(), abs=1e-9)  # whole again


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_a_model_is_written_within_its_budget_and_comes_back_as_it_was_measured(
    moe: dict[str, Any] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Transformer(_config(moe))
    told, job = _compressed(model, tmp_path, loss_budgets=[0.5, 0.02], bits=[4, 8])
    job.run()
    rows = told.tables["budgets.json"]
    assert [row[0] for row in rows] == [0.02, 0.5]
    assert all(max(row[3], row[4]) <= row[0] for row in rows)
    assert rows[0][5] >= rows[1][5]
    assert told.found["measures"]["budgets_kept"] == 2
    assert told.texts["compression.svg"].lstrip().startswith("<?xml")
    assert ("active_entropy_bits" in told.found["measures"]) == (moe is not None)
    assert len(told.tables["tensors.json"]) == len(job.weights)

    found = load_compressed(Path(job.spec.checkpoints))
    assert isinstance(found.blocks[0].attention.query, CompressedMatrix)
    plain = load_model(Path(job.spec.checkpoints))
    assert plain.config.model_dump() == checkpoint_at(told.found["checkpoint"]).manifest["config"]["model"]
    tokens = job.loss.ids_NT
    torch.testing.assert_close(found.eval()(tokens), plain.eval()(tokens), rtol=1e-5, atol=1e-5)
    again = CompressedLoss(plain, torch.cat([tokens, job.loss.targets_NT[:, -1:]], 1))
    assert again.loss() == pytest.approx(told.found["held_out_loss_nats"], abs=1e-5)


def test_joules_are_made_least_where_they_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    told, job = _compressed(
        Transformer(_config()), tmp_path, loss_budgets=[0.1], bits=[4, 8], objective="joules"
    )
    job.run()
    row = told.tables["budgets.json"][0]
    assert row[6] == pytest.approx(1e-11 * row[5], rel=0.5)  # and arithmetic, a tenth of it at 8 bits


def test_without_a_budget_nothing_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    told, job = _compressed(Transformer(_config()), tmp_path)
    job.run()
    assert "checkpoint" not in told.found
    assert "sensitivities.json" not in told.tables
    labels = [(row[0], row[1]) for row in told.tables["uniform.json"]]
    assert {("4", "hqq"), ("4", "round"), ("8", "hqq")} <= set(labels)


def test_a_checkpoint_that_lacks_a_matrix_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = untied(Transformer(_config()))
    stored = {
        "blocks.0.attention.query": compress(model.blocks[0].attention.query.weight, MatrixChoice(bits=8))
    }
    plain = {
        n: t
        for n, t in model.state_dict().items()
        if n not in ("blocks.0.attention.query.weight", "final_norm.weight")
    }
    manifest = {"config": {"model": model.config.model_dump(mode="json")}, "workload": "compress"}
    save_compressed(
        open_checkpoints(tmp_path), 1, plain, stored, dict.fromkeys(stored, MatrixChoice(bits=8)), manifest
    )
    with pytest.raises(CheckpointError, match="not of its own model"):
        load_model(tmp_path)


def test_the_integer_programs_bound_is_corrected_by_what_is_measured() -> None:
    """Losses that interact: together they are twice their sum."""
    loss, cost = [[0.0, 0.01, 0.02]] * 4, [[16.0, 8.0, 4.0]] * 4

    def measure(chosen: tuple[int, ...]) -> LossIncrease:
        found = 2 * sum(loss[0][at] for at in chosen)
        return LossIncrease(found, found / 2)

    search = BudgetSearch(cost, loss, measure, {(0,) * 4: LossIncrease(0.0, 0.0)})
    best = search.within(0.081, 6)
    assert best.measured.worst == pytest.approx(0.08)
    assert best.additive_nats == pytest.approx(0.04)
    assert best.predicted_nats == pytest.approx(
        0.08
    )  # the first assignment, 0.08 in sum, was measured as 0.16
    assert search.found[(2,) * 4].worst == pytest.approx(0.16)
    assert search.within(0.161, 3).chosen == (2,) * 4


def test_where_nothing_new_keeps_a_budget_what_is_known_does() -> None:
    search = BudgetSearch(
        [[2.0, 1.0]], [[0.0, -1.0]], lambda _: LossIncrease(0.2, 0.0), {(0,): LossIncrease(0.05, 0.0)}
    )
    assert search.within(0.1, 2).chosen == (0,)
    with pytest.raises(ToleranceNotMet, match=r"best one loses 0\.05"):
        search.within(0.01, 2)


def test_an_expert_costs_by_how_often_it_is_met() -> None:
    matrix = compress(
        torch.randn(8, 32),
        Candidate(16).choice((8, 32), CompressConfig(start={"path": "/m"}, model=_config())),
    )
    rates = Rates("c", None, None, 2.0, None, 1.0, 10.0)
    cost = ServedCost(MoEConfig(experts=4, chosen=1, capacity_factor=None), rates)
    alone = 2.0 * (10.0 * 8 * 32 * 2 + 2 * 8 * 32)
    assert cost.joules({"blocks.0.attention.query": matrix}) == alone
    assert cost.joules({"blocks.0.feed_forward.experts.up.1": matrix}) == alone / 4
    assert ServedCost(None, None).joules({}) is None


def test_experts_of_a_mixture_stay_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = ["blocks.0.feed_forward.experts.up.0"]
    model = Transformer(_config(MIXTURE))
    with pytest.raises(SpecError, match="other experts"):  # before anything is measured
        _compressed(model, tmp_path, loss_budgets=[0.5], bits=[8], rank_shares=[], keep=keep)


def test_a_compressed_model_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    told, job = _compressed(Transformer(_config()), tmp_path, loss_budgets=[0.5], bits=[8], rank_shares=[])
    write(Path(job.spec.checkpoints) / "tokenizer", byte_level(), None)
    job.run()
    export(Path(job.spec.checkpoints), tmp_path / "out")
    written, plain = load_model(tmp_path / "out"), load_model(Path(told.found["checkpoint"]))
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), plain.parameters(), strict=True))


def test_all_ranks_come_of_one_decomposition() -> None:
    weight_OI = torch.randn(24, 40)
    shelf = Shelf({"a": weight_OI})
    for rank in (3, 24):
        found, wanted = shelf("a", MatrixChoice(rank=rank)), truncate(weight_OI, rank)
        assert found.shape == wanted.shape
        assert torch.equal(found.dequantize(), wanted.dequantize())

"""Costs and cluster files: closed formulas of ZeRO, sources, what is unknown stays unknown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import EscalaError, NotFoundError, SpecError
from escala.documents import dump, read_yaml
from escala.hardware import Cluster, directory, load_cluster, names
from escala.planning.bench import _device
from escala.planning.cost import communication, cost, memory_bytes
from escala.schema import PretrainConfig, SftConfig
from escala.schema.flops import parameter_counts, saved_elements_per_token

PLAIN: dict[str, Any] = {  # a device with round figures
    "about": "round figures",
    "memory_bytes": {"value": 1e11, "source": "a test"},
    "memory_bytes_per_second": {"value": 1e12, "source": "a test"},
    "peak_flops_per_second": {
        "fp32": {"value": 1e12, "source": "a test"},
        "bf16": {"value": 2e12, "source": "a test"},
    },
    "utilization": {"value": 0.5, "source": "a test"},
    "link_bytes_per_second": {"value": 1e9, "source": "a test"},
    "link_seconds": {"value": 0.0, "source": "a test"},
}
ENERGY = {
    name: {"value": 1.0, "source": "a test"}
    for name in ("static_watts", "joules_per_flop", "joules_per_byte")
}


GPUS = (
    "--set",
    "training.precision=bf16",
    "--set",
    "resources.workers=8",
    "--set",
    "resources.gpus_per_worker=1",
)


def cluster(devices: int = 2, **keys: Any) -> Cluster:
    device = {**PLAIN, **keys.pop("device", {})}
    return Cluster.model_validate({"device": device, "devices": devices, **keys})


def config(workers: int = 2, stage: int = 3, precision: str = "fp32", **training: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "model": {"n_layers": 12, "d_model": 640, "n_heads": 10, "vocab_size": 4096},
            "training": {"zero_stage": stage, "precision": precision, "batch_sequences": 8, **training},
            "resources": {"workers": workers},
        }
    )


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_per_parameter"),
    [
        (0, "fp32", 16),
        (1, "fp32", 4 + 4 + 12 / 2),
        (2, "fp32", 4 + 4 / 2 + 12 / 2),
        (3, "fp32", 4 + 20 / 2),
        (2, "bf16", 2 + 4 / 2 + 12 / 2),
        (3, "bf16", 2 + 18 / 2),
    ],
)
def test_states_are_split_as_zero_splits_them(stage: int, precision: str, bytes_per_parameter: float) -> None:
    """Rajbhandari et al. 2020, section 3; at stage 3 all parameters are gathered beside the shares; gradients add up in
    fp32.
    """
    asked = config(2, stage, precision)
    found = memory_bytes(asked, cluster().device)
    n = parameter_counts(asked.model).n_total
    assert found.weights + found.gradients + found.optimizer == pytest.approx(bytes_per_parameter * n)
    assert (
        found.total
        <= found.weights + found.gradients + found.optimizer + found.buckets + found.activations + 1
    )


def test_checkpointing_keeps_a_block_s_input_and_costs_a_forward_pass() -> None:
    plain, again = config(), config(activation_checkpointing=True)
    saved = saved_elements_per_token(plain.model, True)
    assert saved.blocks == 12 * 640
    assert memory_bytes(again, cluster().device).total < memory_bytes(plain, cluster().device).total
    a, b = cost(plain, cluster()), cost(again, cluster())
    assert b.compute_flops == a.compute_flops
    assert 1.2 < b.compute_seconds / a.compute_seconds < 4 / 3
    assert 1.2 < b.hardware_flops / a.hardware_flops < 4 / 3


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "passes"),  # of half of the parameters (two ranks), in fp32's 4 bytes
    [
        (3, "fp32", None, 3),
        (3, "fp32", 1, 12),
        (2, "fp32", None, 3),
        (1, "fp32", None, 3),
        (0, "fp32", None, 2),
        (3, "bf16", None, 2),
        (2, "bf16", None, 2.5),
        (2, "bf16", 2, 4.5),
        (1, "bf16", 2, 2.5),
    ],
)
def test_volumes_are_those_counted_on_real_runs(
    stage: int, precision: str, micro: int | None, passes: float
) -> None:
    asked = config(2, stage, precision, micro_batch_sequences=micro)
    n = parameter_counts(asked.model).n_total
    assert communication(asked).sent_bytes == pytest.approx(passes * 4 * n / 2)
    assert communication(config(1, stage, precision)).sent_bytes == 0


def test_a_mixture_holds_and_moves_all_its_experts() -> None:
    """At equal active size: states and ZeRO-3's traffic are of N_total, compute of N_active (docs/theory B.6, D.7)."""
    dense = config()
    model = {"n_layers": 12, "d_model": 640, "n_heads": 10, "vocab_size": 4096}
    few, many = (
        PretrainConfig.model_validate(
            {
                **dense.model_dump(),
                "model": {**model, "moe": {"experts": e, "d_ff": 864, "capacity_factor": 1.0}},
            }
        )
        for e in (4, 16)
    )
    more = 12 * 12 * 3 * 640 * 864 + 12 * 12 * 640  # twelve experts and their logits in each layer
    a, b = cost(few, cluster()), cost(many, cluster())
    assert b.n_total - a.n_total == more
    assert b.n_active - a.n_active == 12 * 12 * 640
    assert b.communication.sent_bytes - a.communication.sent_bytes == pytest.approx(3 * 4 * more / 2)
    assert b.communication.messages - a.communication.messages == 4  # buckets; stacked: no message an expert
    held = [found.memory.weights + found.memory.gradients + found.memory.optimizer for found in (a, b)]
    assert held[1] - held[0] == pytest.approx((4 + 20 / 2) * more)
    assert b.compute_flops == pytest.approx(a.compute_flops, rel=0.01)
    assert b.compute_seconds < 1.2 * a.compute_seconds


def shared(expert_parallel: bool, workers: int = 2, stage: int = 2, **training: Any) -> PretrainConfig:
    model = {"n_layers": 12, "d_model": 640, "n_heads": 10, "vocab_size": 4096}
    moe = {"experts": 8, "d_ff": 864, "every": 3, "expert_parallel": expert_parallel}
    asked = {**config(workers, stage, **training).model_dump(), "model": {**model, "moe": moe}}
    return PretrainConfig.model_validate(asked)


EXPERTS = 4 * 8 * 3 * 640 * 864  # four layers of eight


def test_shared_experts_send_each_choice_there_and_back_twice_and_nothing_of_themselves() -> None:
    plain, found = (communication(shared(is_shared)) for is_shared in (False, True))
    rows = 4 * 4 * 2 * 8 * 256 / 2  # exchanges, layers, choices, tokens of a rank
    saved = 3 * 4 * EXPERTS / 2  # an all-reduce in fp32 and a gather
    assert found.sent_bytes - plain.sent_bytes == pytest.approx(rows * 640 * 4 / 2 - saved)
    buckets = -(-parameter_counts(shared(True).model).n_total // 50_000_000) - 1
    assert found.messages - plain.messages == 5 * 4 - 2 * buckets
    again = communication(shared(True, activation_checkpointing=True))
    assert again.sent_bytes - found.sent_bytes == pytest.approx(rows / 2 * 640 * 4 / 2)
    assert communication(shared(True, workers=1)).sent_bytes == 0


@pytest.mark.parametrize(
    ("stage", "precision", "alone", "together"),  # bytes an expert's parameter
    [
        (0, "fp32", 16, 16 / 2),
        (1, "fp32", 4 + 4 + 12 / 2, 16 / 2),
        (2, "fp32", 4 + 16 / 2, 16 / 2),
        (2, "bf16", 2 + 16 / 2, 18 / 2),
    ],
)
def test_shared_experts_are_held_once(stage: int, precision: str, alone: float, together: float) -> None:
    plain, found = (
        memory_bytes(shared(is_shared, stage=stage, precision=precision), cluster().device)
        for is_shared in (False, True)
    )
    held = [m.weights + m.gradients + m.optimizer for m in (plain, found)]
    assert held[0] - held[1] == pytest.approx((alone - together) * EXPERTS)
    assert found.buckets <= plain.buckets
    assert found.activations > plain.activations
    one = [memory_bytes(shared(s, workers=1, stage=stage), cluster().device) for s in (False, True)]
    assert one[0] == one[1]


def of_kind(kind: str, **training: Any) -> PretrainConfig:
    model = {"n_layers": 12, "d_model": 640, "n_heads": 10, "vocab_size": 4096, "attention": kind}
    return PretrainConfig.model_validate({**config(**training).model_dump(), "model": model})


def test_long_contexts_cost_what_their_kind_of_attention_does() -> None:
    exact, hybrid = (cost(of_kind(kind, precision="bf16"), cluster()) for kind in ("exact", "hybrid"))
    assert [c.context_tokens for c in exact.contexts] == [256, 32_768, 131_072, 1_048_576]
    own, *_, longest = exact.contexts
    n = parameter_counts(of_kind("exact").model).n_total
    assert (exact.attention, exact.chi) == ("exact", own.chi)
    assert longest.chi == pytest.approx(1 + 12 * 640 * 2**20 / n, rel=0.01)  # L H d_h T/N (docs/theory D.2)
    assert longest.state == 2 * 12 * 640 * 2 * 2**20  # keys and values of all layers in bf16
    assert longest.logits == 3 * 4096 * 4 * 2**20
    assert exact.kv_cache_bytes_per_token == 2 * 12 * 640 * 2
    for found in (exact, hybrid):  # a training step's memory is linear in T, whatever the kind
        rates = [
            (c.activations / c.context_tokens, c.checkpointed / c.context_tokens) for c in found.contexts
        ]
        assert rates == [pytest.approx(rates[0])] * 4
        assert rates[0][1] < rates[0][0] / 4
    far = hybrid.contexts[-1]
    assert far.chi == pytest.approx(hybrid.contexts[1].chi, rel=0.01)
    assert far.chi < longest.chi / 50
    assert {c.state for c in hybrid.contexts} == {far.state}
    assert hybrid.kv_cache_bytes_per_token == 0
    own_alone = 12 * (10 + 10)  # a gain and a temperature a head and layer: all that ZeRO's gathers have more
    assert hybrid.n_total - exact.n_total == own_alone
    assert hybrid.communication.sent_bytes - exact.communication.sent_bytes == pytest.approx(
        4 * 2 * own_alone / 2
    )


def test_a_step_s_activations_are_those_of_its_context() -> None:
    asked = of_kind("hybrid", precision="bf16", micro_batch_sequences=1)
    own = cost(asked, cluster()).contexts[0]
    assert memory_bytes(asked, cluster().device).activations == own.activations + own.logits
    again = of_kind("hybrid", precision="bf16", micro_batch_sequences=1, activation_checkpointing=True)
    own = cost(again, cluster()).contexts[0]
    assert memory_bytes(again, cluster().device).activations == own.checkpointed + own.logits


def test_landmarks_grow_and_a_window_does_not() -> None:
    nystrom, window = (cost(of_kind(kind), cluster()) for kind in ("nystrom", "window"))
    assert nystrom.kv_cache_bytes_per_token == 12 * 10 * 16 * (2 * 64 + 1) * 4 / 128  # 16 a block of 128
    assert window.kv_cache_bytes_per_token == 0
    assert window.contexts[-1].state == 2 * 12 * 640 * 4 * 256


def test_time_is_compute_and_what_is_not_hidden() -> None:
    found = cost(config(), cluster())
    flops = found.compute_flops / found.steps / 2
    assert found.compute_seconds == pytest.approx(flops / 0.5e12, rel=0.05)
    assert found.exposed_seconds == pytest.approx(found.communication.sent_bytes / 1e9)
    assert found.wall_seconds == pytest.approx(found.steps * found.step_seconds)
    gpu = config().model_copy(
        update={"resources": config().resources.model_copy(update={"gpus_per_worker": 1})}
    )
    assert cost(gpu, cluster()).exposed_seconds < found.exposed_seconds


def test_unknown_prices_and_energy_stay_unknown() -> None:
    found = cost(config(), cluster())
    assert (found.usd, found.energy_joules, found.gco2e) == (None, None, None)
    told = cost(
        config(),
        cluster(
            device=ENERGY,
            usd_per_device_hour={"value": 2.0, "source": "a test"},
            gco2e_per_kwh={"value": 500.0, "source": "a test"},
            power_usage_effectiveness={"value": 1.5, "source": "a test"},
        ),
    )
    assert told.usd == pytest.approx(2 * 2.0 * told.wall_seconds / 3600)
    assert told.energy_joules is not None
    assert told.energy_joules > 1.5 * (told.hardware_flops + 2 * told.wall_seconds)
    assert told.gco2e == pytest.approx(told.energy_joules / 3.6e6 * 500)


def test_shipped_clusters_load_and_every_number_has_a_source() -> None:
    assert {"local", "h100-8"} <= set(names())
    for name in names():
        assert load_cluster(name).devices > 0
    for name, device in read_yaml(directory() / "devices.yaml").items():
        loaded = Cluster.model_validate({"device": device, "devices": 1}).device
        assert loaded.measured == "not measured here", name


def test_a_cluster_s_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no cluster 'h100'"):
        load_cluster("h100")
    path = tmp_path / "mine.yaml"
    path.write_text(dump({"device": "h100-sxm", "devices": 4}))
    assert load_cluster(path).devices == 4
    path.write_text(dump({"device": "h1000", "devices": 4}))
    with pytest.raises(SpecError, match="no device 'h1000'"):
        load_cluster(path)
    path.write_text(
        dump({"device": PLAIN, "devices": 4, "power_usage_effectiveness": {"value": 0.5, "source": "x"}})
    )
    with pytest.raises(SpecError, match="1 or more"):
        load_cluster(path)
    path.write_text(dump({"device": {**PLAIN, "utilization": None}, "devices": 4}))
    with pytest.raises(SpecError, match="utilization"):
        load_cluster(path)
    path.write_text(dump({"device": {**PLAIN, "memory_bytes": {"value": 1e9}}, "devices": 4}))
    with pytest.raises(SpecError, match="source"):
        load_cluster(path)


def test_measured_speeds_are_interpolated_between_widths() -> None:
    speed = {"block": {256: 1e11, 1024: 4e11}, "recompute": {256: 1e11}, "head": 1e11, "source": "a test"}
    found = cluster(device={"training": {"fp32": speed}}).device.training
    assert found is not None
    assert found["fp32"].block_at(512) == pytest.approx(2e11)
    assert found["fp32"].block_at(64) == 1e11
    assert found["fp32"].block_at(4096) == 4e11


def test_a_bench_s_figures_make_a_device() -> None:
    facts = {
        "device": "a CPU",
        "workers": 1,
        "memory_bytes": 8_123_456_789,
        "memory_bytes_per_second": 1.9e10,
        "optimizer_parameters_per_second": 8e8,
        "runtime_bytes": 8e7,
        "link_bytes_per_second": None,
        "link_seconds": None,
        "precisions": {
            "fp32": {
                "peak_flops_per_second": 9e10,
                "block": {"256": 6e10},
                "recompute": {"256": 6e10},
                "head": 8e10,
                "alone": 1.1,
            }
        },
    }
    made = Cluster.model_validate({"device": _device(facts, "run 7"), "devices": 1}).device
    assert made.memory_bytes.value == 8.12e9
    assert made.measured == made.memory_bytes.source == "run 7"
    alone = Cluster(device=made, devices=1)
    assert cost(config(workers=1), alone).exposed_seconds == 0
    with pytest.raises(SpecError, match="measured alone"):
        cost(config(workers=2), alone)


def test_cost_from_the_command_line() -> None:
    def ask(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["cost", *arguments])
        if isinstance(done.exception, EscalaError):
            raise done.exception
        return done.stdout

    shown = ask("--cluster", "h100-8", "--set", "model.n_layers=48", "--set", "model.d_model=8192")
    assert "DOES NOT FIT" in shown
    assert "not measured here" in shown
    hybrid = ask("--cluster", "h100-8", "--set", "model.attention=hybrid")
    assert "attention       hybrid, chi 1." in hybrid
    assert "MB a sequence in generation, however long it is" in hybrid
    assert "1,048,576" in hybrid
    big = ask("--cluster", "h100-8", "--set", "model.n_layers=48", "--set", "model.d_model=8192")
    assert "none: it fits in a device's memory on no number up to 8; more than 8 were not looked at" in big
    plain, table = (
        ("--compute-flops", "1e19", "--cluster", "h100-8", *GPUS),
        ("--workers", "--max-workers", "1024"),
    )
    shown = ask(*plain)
    assert shown.splitlines()[-1] == (
        "workers         P* = 8: P T^2 is 97.4% higher with fewer; more than 8 were not looked at; "
        "does not fit below P = 4"
    )
    shown = ask(*plain, *table)
    assert "P* = 136: P T^2 is 36.1% higher with fewer, 100.3% higher with more; does not fit" in shown
    assert re.search(r"^1 .* DOES NOT FIT *$", shown, re.M)
    assert re.search(r"^8 .* 26.684 .* as configured *", shown, re.M)
    assert re.search(r"^136 .* 9.1% .* P\*, least time *$", shown, re.M)
    assert "beyond the cluster's 8 devices" in shown
    curve = json.loads(ask(*plain, *table, "--json"))["workers"]
    assert (curve["best_workers"], curve["own_workers"], curve["max_workers"]) == (136, 8, 1024)
    assert [row["workers"] for row in curve["rows"]][-2:] == [272, 544]
    answer = json.loads(ask("--cluster", "h100-8", "--compute-flops", "1e18", "--json"))
    assert answer["compute_flops"] == pytest.approx(1e18, rel=0.01)
    assert answer["cost_usd"] == pytest.approx(2.5 * answer["wall_seconds"] / 3600)
    with pytest.raises(NotFoundError):
        ask("--cluster", "nowhere")


def test_a_base_in_codes_is_whole_on_every_worker() -> None:
    """12 blocks of 640: 4 x 640^2 and 3 x 640 x d_ff weights, a bf16 scale and offset for each group of 32."""
    model = config().model.model_dump()

    def weights(**lora: Any) -> float:
        asked = SftConfig.model_validate(
            {
                "model": model,
                "tokenizer": "t.json",
                "data": {"train": "t.jsonl"},
                "lora": lora,
                "training": {"zero_stage": 3, "batch_sequences": 8, "context_tokens": 64},
                "resources": {"workers": 2},
            }
        )
        return memory_bytes(asked, cluster().device).weights

    n = parameter_counts(config().model).n_total
    matrices = 12 * (4 * 640**2 + 3 * 640 * config().model.ff_size)
    assert weights() == pytest.approx(4 * n * 1.5)
    largest = 640 * config().model.ff_size * 9
    assert weights(base="int4") == pytest.approx(4 * (n - matrices) * 1.5 + matrices * 0.625 + largest)
    kept = weights(base="int4", quantization={"keep": ["*.feed_forward.*"]})
    assert kept == pytest.approx(4 * (n - 12 * 4 * 640**2) * 1.5 + 12 * 4 * 640**2 * 0.625 + 640**2 * 9)

"""Devices and clusters, as their YAML says: what they do, draw and cost. Every number has its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from escala.contract.records import Rates
from escala.schema.attention.speed import AttentionSpeed
from escala.schema.base import Strict

Precision = Literal["fp32", "bf16"]
NOT_MEASURED = "not measured here"


class Sourced(Strict):
    """A number and where it is from: a data sheet, a price list, a measurement with its run."""

    value: float = Field(ge=0, description="in the unit that the key names")
    source: str = Field(min_length=1, description="a data sheet, a price list, a measurement with its run")


class TrainingSpeed(Strict):
    """FLOP/s that a training step reaches on one device, as `escala bench device` measured them with all devices of
    the cluster at work.
    """

    block: dict[int, float] = Field(min_length=1, description="by d_model: a block's forward and backward")
    recompute: dict[int, float] = Field(min_length=1, description="by d_model: a block's forward alone")
    head: float = Field(gt=0, description="unembedding, cross entropy and their backward")
    alone: float = Field(1.0, gt=0, description="factor on all of these where one worker trains alone")
    efficiency: dict[int, float] = Field(
        default_factory=dict,
        description="by ZeRO stage: a step's time by its parts, over the time that it took on all workers",
    )
    source: str = Field(min_length=1, description="the run that measured it")

    def efficiency_at(self, stage: int) -> float:
        """`efficiency` of a ZeRO stage, or of the nearest one that was measured; 1 where none was."""
        return self.efficiency[min(self.efficiency, key=lambda s: abs(s - stage))] if self.efficiency else 1.0

    def block_at(self, width: int) -> float:
        """`block` at a width, interpolated in the logarithms; constant beyond what was measured."""
        return _interpolated(self.block, width)

    def recompute_at(self, width: int) -> float:
        """`recompute` at a width."""
        return _interpolated(self.recompute, width)


class Device(Strict):
    """One accelerator, or one CPU worker.

    The estimate of its energy is static_watts * seconds + joules_per_flop * FLOPs + joules_per_byte * bytes moved in
    memory (docs/theory E.1). Raises ValueError where neither `training` nor `utilization` says how fast it trains.
    """

    about: str = Field(description="one line for people")
    measured: str = Field(NOT_MEASURED, description="by which run and when, or that it was not")
    memory_bytes: Sourced
    memory_bytes_per_second: Sourced
    peak_flops_per_second: dict[Precision, Sourced] = Field(min_length=1, description="dense matmul")
    training: dict[Precision, TrainingSpeed] | None = None
    attention: dict[Precision, AttentionSpeed] = Field(
        default_factory=dict, description="of each kind, as `escala bench attention` measured it"
    )
    utilization: Sourced | None = Field(
        None, description="of the peak, by a training step: where none was measured"
    )
    optimizer_parameters_per_second: Sourced | None = Field(
        None, description="AdamW; None: from its 28 bytes a parameter"
    )
    link_bytes_per_second: Sourced | None = Field(
        None, description="sent by a device in a collective; None: measured alone"
    )
    link_seconds: Sourced | None = Field(None, description="latency of a collective")
    runtime_bytes: Sourced | None = Field(
        None, description="what the libraries take on a worker once they train, whatever the model"
    )
    static_watts: Sourced | None = None
    joules_per_flop: Sourced | None = None
    joules_per_byte: Sourced | None = None

    @model_validator(mode="after")
    def _check(self) -> Device:
        if self.training is None and self.utilization is None:
            raise ValueError("give training (measured speeds) or utilization (a share of the peak)")
        return self


class Cluster(Strict):
    """So many devices of one kind, and what an hour of them costs. None: not known, and then nothing is made of it."""

    about: str = Field("", description="one line for people")
    device: Device
    devices: int = Field(gt=0, description="as many as there are")
    backend: str = Field("ray", description="what starts its jobs (escala.jobs.backends)")
    usd_per_device_hour: Sourced | None = None
    gco2e_per_kwh: Sourced | None = Field(None, description="of the grid: grams of CO2 equivalent")
    power_usage_effectiveness: Sourced | None = Field(None, description="of the site; None: 1")

    @field_validator("power_usage_effectiveness")
    @classmethod
    def _at_least_one(cls, value: Sourced | None) -> Sourced | None:
        if value is not None and value.value < 1:
            raise ValueError("a site takes at least what its devices take: 1 or more")
        return value

    @property
    def site_factor(self) -> float:
        """Energy at the meter per energy of the devices."""
        return 1.0 if self.power_usage_effectiveness is None else self.power_usage_effectiveness.value

    def rates(self) -> Rates:
        """What a run's record needs of this cluster."""
        device = self.device
        return Rates(
            cluster=self.about,
            usd_per_device_hour=_value(self.usd_per_device_hour),
            gco2e_per_kwh=_value(self.gco2e_per_kwh),
            site_factor=self.site_factor,
            static_watts=_value(device.static_watts),
            joules_per_flop=_value(device.joules_per_flop),
            joules_per_byte=_value(device.joules_per_byte),
        )


def _value(sourced: Sourced | None) -> float | None:
    return None if sourced is None else sourced.value


def _interpolated(values: Mapping[int, float], at: int) -> float:
    widths = sorted(values)
    if at <= widths[0]:
        return values[widths[0]]
    for low, high in pairwise(widths):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(values[low]) + share * math.log(values[high]))
    return values[widths[-1]]

"""Flags, defaults and the schedule of the capacity."""

import argparse
from dataclasses import fields

import pytest

from megatron_et.config import ConfigError, ExpertThresholdConfig, choices, dest_of, flag_of, scalar_type


def et(**knobs: object) -> ExpertThresholdConfig:
    return ExpertThresholdConfig(**({"router_type": "expert-threshold"} | knobs))


def test_defaults_are_the_papers() -> None:
    config = ExpertThresholdConfig()
    assert (config.router_type, config.active) == ("topk", False)
    assert (config.ema_decay, config.warmup_steps, config.capacity_factor) == (0.999, 4000, None)


@pytest.mark.parametrize(
    ("knobs", "flag"),
    [
        ({"router_type": "expert_threshold"}, "--moe-router-type"),
        ({"ema_decay": 1.0}, "--moe-et-ema-decay"),
        ({"ema_decay": -0.1}, "--moe-et-ema-decay"),
        ({"warmup_steps": -1}, "--moe-et-warmup-steps"),
        ({"warmup_anneal_steps": -5}, "--moe-et-warmup-anneal-steps"),
        ({"capacity_factor": -0.5}, "--moe-et-capacity-factor"),
        ({"capacity_factor": float("inf")}, "--moe-et-capacity-factor"),
        ({"capacity_factor": float("nan")}, "--moe-et-capacity-factor"),
        ({"guard": 0.0}, "--moe-et-guard"),
        ({"guard": float("nan")}, "--moe-et-guard"),
        ({"max_fanout": 0}, "--moe-et-max-fanout"),
        ({"gate_normalization": "softmax"}, "--moe-et-gate-normalization"),
        ({"router_type": "expert-choice", "capacity_factor": 0.5}, "--moe-et-capacity-factor"),
        ({"router_type": "expert-choice", "warmup_anneal_steps": 5}, "--moe-et-warmup-anneal-steps"),
    ],
)
def test_bad_values_name_the_flag_and_the_value(knobs: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        et(**knobs)
    assert flag in str(error.value)
    name = next(k for k in knobs if dest_of(k) == flag.removeprefix("--").replace("-", "_"))
    assert str(knobs[name]) in str(error.value)


def test_every_field_has_a_flag_a_type_and_a_meaning() -> None:
    flags = [flag_of(knob.name) for knob in fields(ExpertThresholdConfig)]
    assert len(set(flags)) == len(flags)
    for knob in fields(ExpertThresholdConfig):
        assert knob.metadata["help"]
        assert scalar_type(knob.name) in (int, float, str)
    assert choices("router_type") == ("topk", "expert-threshold", "expert-choice")
    assert choices("ema_decay") == ()


def test_from_args_ignores_what_is_missing() -> None:
    args = argparse.Namespace(moe_router_type="expert-choice", moe_et_ema_decay=0.5)
    config = ExpertThresholdConfig.from_args(args)
    assert (config.router_type, config.ema_decay, config.warmup_steps) == ("expert-choice", 0.5, 4000)

"""ExpertThresholdConfig: every knob of Expert Threshold routing, its default, its meaning and its validation.

This class is the single source of the command-line flags: `host/arguments.py` builds them from the fields
below.
"""

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

RouterType = Literal["topk", "expert-threshold", "expert-choice"]
GateNormalization = Literal["none", "fanout"]
Pool = Literal["microbatch", "global"]
Kernels = Literal["auto", "torch", "triton", "cuda"]


class ConfigError(ValueError):
    """A flag, or a combination of flags, that Expert Threshold routing does not run with."""


def _knob(default: Any, flag: str, meaning: str) -> Any:
    return field(default=default, metadata={"flag": flag, "help": meaning})


@dataclass(frozen=True, kw_only=True)
class ExpertThresholdConfig:
    """Settings of the router; Megatron's `moe_router_topk` stays the target mean fan-out.

    Raises:
        ConfigError: a value outside its range, naming the flag, the value and what is allowed.
    """

    router_type: RouterType = _knob(
        "topk",
        "--moe-router-type",
        "topk leaves Megatron untouched; expert-threshold routes each token to every expert whose threshold "
        "its "
        "logit reaches; expert-choice trains with the k best tokens of each expert and evaluates by "
        "thresholds",
    )
    ema_decay: float = _knob(
        0.999, "--moe-et-ema-decay", "beta of the threshold EMA, one update per committed global batch"
    )
    warmup_steps: int = _knob(
        4000,
        "--moe-et-warmup-steps",
        "global batches routed by Expert Choice first, while the thresholds settle",
    )
    warmup_anneal_steps: int = _knob(
        0,
        "--moe-et-warmup-anneal-steps",
        "global batches after the warm-up over which the capacity factor grows from 0 instead of jumping",
    )
    capacity_factor: float | None = _knob(
        None,
        "--moe-et-capacity-factor",
        "C: in training an expert takes between (1-C)k and (1+C)k tokens of the routing pool; none = no "
        "bound",
    )
    pool: Pool = _knob(
        "microbatch",
        "--moe-et-pool",
        "routing pool of Expert Choice and capacity: microbatch = this rank's tokens of the micro-batch, "
        "global = all "
        "ranks' tokens of the micro-batch step (exact, four small all-reduces a layer while such a bound is "
        "in force)",
    )
    guard: float | None = _knob(
        None,
        "--moe-et-guard",
        "G, 0.5 recommended: an expert whose load at its threshold was outside (1-G)k to (1+G)k in three "
        "global batches in a row, on the same side, starts its EMA again from the last cutoff; none = "
        "off",
    )
    max_fanout: int | None = _knob(
        None,
        "--moe-et-max-fanout",
        "at most this many experts a token, best logits first; none = no bound, or the largest that DeepEP "
        "can carry (32 slots a token)",
    )
    gate_normalization: GateNormalization = _knob(
        "none", "--moe-et-gate-normalization", "fanout divides a token's gates by its fan-out (paper, E.4)"
    )
    kernels: Kernels = _knob(
        "auto",
        "--moe-et-kernels",
        "what routes and counts: torch = tensor operations; triton = fused kernels, same map and counts bit "
        "for bit; cuda = everything forward in one CUDA kernel (for a multiple of 8 experts, no fan-out "
        "bound, no normalization; else Triton's), the bounds of warm-up and capacity in another (pool "
        "microbatch); auto = triton where every rank of the job has a GPU on which it passes a try-out, "
        "else torch",
    )
    trace_dir: str | None = _knob(
        None,
        "--moe-et-trace-dir",
        "folder for et_trace.jsonl: usage, threshold and cutoff of every expert at each log interval, "
        "read by `megatron-et report`",
    )

    def __post_init__(self) -> None:
        for knob in fields(self):
            allowed = choices(knob.name)
            value = getattr(self, knob.name)
            if allowed and value not in allowed:
                raise ConfigError(f"{knob.metadata['flag']} is {value!r}: choose one of {', '.join(allowed)}")
        self._require(0.0 <= self.ema_decay < 1.0, "ema_decay", "must be in [0, 1)")
        self._require(self.warmup_steps >= 0, "warmup_steps", "must be 0 or more global batches")
        self._require(
            self.warmup_anneal_steps >= 0, "warmup_anneal_steps", "must be 0 or more global batches"
        )
        if self.capacity_factor is not None:
            finite = math.isfinite(self.capacity_factor)
            self._require(
                finite and self.capacity_factor >= 0.0, "capacity_factor", "must be finite and >= 0"
            )
        if self.guard is not None:
            self._require(math.isfinite(self.guard) and self.guard > 0.0, "guard", "must be finite and > 0")
        if self.max_fanout is not None:
            self._require(self.max_fanout >= 1, "max_fanout", "must be at least 1 expert a token")
        if self.router_type == "expert-choice":
            why = (
                "has no effect with --moe-router-type expert-choice, which always trains at C=0: leave it out"
            )
            self._require(self.capacity_factor is None, "capacity_factor", why)
            self._require(self.warmup_anneal_steps == 0, "warmup_anneal_steps", why)

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise ConfigError(f"{flag_of(name)} is {getattr(self, name)}: it {rule}")

    @property
    def active(self) -> bool:
        """Whether this package routes at all (False: Megatron's own top-k, untouched)."""
        return self.router_type != "topk"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Read the settings from parsed arguments; a missing attribute keeps its default."""
        values: dict[str, Any] = {
            knob.name: getattr(args, dest_of(knob.name), knob.default) for knob in fields(cls)
        }
        return cls(**values)


def flag_of(name: str) -> str:
    """Command-line flag of a field: 'ema_decay' -> '--moe-et-ema-decay'."""
    return next(knob.metadata["flag"] for knob in fields(ExpertThresholdConfig) if knob.name == name)


def dest_of(name: str) -> str:
    """Attribute of a field on Megatron's args: 'ema_decay' -> 'moe_et_ema_decay'."""
    return flag_of(name).removeprefix("--").replace("-", "_")


def choices(name: str) -> tuple[str, ...]:
    """Allowed values of a Literal field, empty for numbers."""
    hint = get_type_hints(ExpertThresholdConfig)[name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def scalar_type(name: str) -> type:
    """Type that parses one value of the field: int, float or str."""
    hint = get_type_hints(ExpertThresholdConfig)[name]
    if get_origin(hint) is Literal:
        return str
    plain = [part for part in (get_args(hint) or (hint,)) if part is not type(None)]
    return plain[0]

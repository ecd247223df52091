"""The numbers of a report: every metric of every MoE layer over steps, and its mean over a window.

S logged steps, E routed experts, F fan-out bins.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_et.observe.alarms import Alarm, Monitor
from megatron_et.observe.report.read import RunData, Series, TensorBoard
from megatron_et.observe.trace import PHASES, SECONDS_PER_STEP, TRAINING_LOSS, Floats, Ints, LayerTrace

SUMMARY_SCHEMA = 1
DEFAULT_WINDOW_SHARE = 0.2
RECENT_LOSSES = 20
PHASE_NAMES = {"warmup": "warm-up", "anneal": "anneal", "threshold": "threshold"}


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One MoE layer: each metric is computed at every logged step, then averaged over the window's steps.

    Shares are of tokens (usage, tokens_*) or of experts (capacity_bound_share), between 0 and 1; thresholds
    and the gap are on the scale of the router logits. None: not logged.
    """

    layer: int
    expert_usage_min: float | None
    expert_usage_mean: float | None
    expert_usage_max: float | None
    max_violation: float | None
    fanout_mean: float | None
    fanout_max: float | None
    tokens_0_experts: float | None
    tokens_1_expert: float | None
    tokens_2plus_experts: float | None
    threshold_min: float | None
    threshold_mean: float | None
    threshold_max: float | None
    cutoff_gap: float | None
    dead_experts: float | None
    capacity_bound_share: float | None


METRICS = tuple(f.name for f in fields(LayerSummary) if f.name != "layer")


@dataclass(frozen=True)
class LayerHistory:
    """One MoE layer over its logged steps; `experts` only where there is a trace."""

    layer: int
    steps_S: Ints
    metrics: dict[str, Floats]
    experts: LayerTrace | None


@dataclass(frozen=True)
class Window:
    """The logged steps whose mean stands in the table; `phase` None: unknown, since there is no trace."""

    phase: str | None
    first_step: int
    last_step: int
    logged_steps: int

    def describe(self) -> str:
        """For a caption: which steps, and of which phase."""
        steps = (
            f"at step {self.last_step}"
            if self.logged_steps == 1
            else f"mean over {self.logged_steps} logged steps, {self.first_step} to {self.last_step}"
        )
        if self.phase is None:
            return f"{steps} (phase not known without a trace)"
        if self.phase == "threshold":
            return f"{steps}, threshold phase"
        return f"{steps}, {PHASE_NAMES[self.phase]} phase: no step of the threshold phase is logged yet"


@dataclass(frozen=True)
class FinalLoss:
    """The last logged value of a loss, in nats per token."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a report says about a run. None: not logged or not reached."""

    schema: int
    run: str
    last_step: int
    tokens: int | None
    """Consumed sequences times sequence length, or else estimated from the trace's logged steps."""
    num_experts: int | None
    topk: int | None
    target_rate: float | None
    """topk / num_experts: share of tokens that each expert should take."""
    training_loss: FinalLoss | None
    training_loss_recent: float | None
    """Mean of the last RECENT_LOSSES logged training losses; None where fewer are logged."""
    validation_losses: dict[str, FinalLoss]
    seconds_per_step: float | None
    """Median of the logged iteration times."""
    warmup_end: int | None
    """First logged step after the warm-up; None before it, without a warm-up, or without a trace."""
    threshold_start: int | None
    """First logged step of the threshold phase."""
    window: Window | None
    layers: list[LayerSummary]
    alarms: list[Alarm] | None
    """Those that are on at the last logged step; None without a trace."""
    past_alarms: list[Alarm]
    """Those that have ended, by their end."""
    missing: list[str]
    warnings: list[str]


def layer_histories(data: RunData) -> list[LayerHistory]:
    """Every MoE layer, ascending: from the trace, or else from the router's scalars in TensorBoard."""
    if data.trace is not None:
        return [
            LayerHistory(number, traced.steps_S, trace_metrics(traced), traced)
            for number, traced in data.trace.layers.items()
        ]
    return _tensorboard_histories(data.tensorboard)


def trace_metrics(traced: LayerTrace) -> dict[str, Floats]:
    """Every metric of METRICS at each logged step, [S] each; NaN where it is undefined."""
    usage_SE = traced.usage_SE.astype(np.float64)
    mean_S, max_S = usage_SE.mean(axis=1), usage_SE.max(axis=1)
    tokens_S1 = traced.fanout_histogram_SF.sum(axis=1, keepdims=True)
    share_SF = _divide(traced.fanout_histogram_SF, tokens_S1)
    fanouts_F = np.arange(share_SF.shape[1])
    threshold_SE = np.ma.masked_invalid(traced.threshold_SE)
    gap_SE = np.abs(traced.cutoff_SE.astype(np.float64) - traced.threshold_SE)
    no_one_S = np.where(tokens_S1[:, 0] > 0, 0.0, np.nan)
    return {
        "expert_usage_min": usage_SE.min(axis=1),
        "expert_usage_mean": mean_S,
        "expert_usage_max": max_S,
        "max_violation": np.where(mean_S > 0, _divide(max_S, mean_S) - 1.0, 0.0),
        "fanout_mean": share_SF @ fanouts_F,
        "fanout_max": ((share_SF > 0) * fanouts_F).max(axis=1).astype(np.float64),
        "tokens_0_experts": share_SF[:, 0],
        "tokens_1_expert": share_SF[:, 1] if share_SF.shape[1] > 1 else no_one_S,
        "tokens_2plus_experts": share_SF[:, 2:].sum(axis=1),
        "threshold_min": threshold_SE.min(axis=1).astype(np.float64).filled(np.nan),
        "threshold_mean": threshold_SE.mean(axis=1, dtype=np.float64).filled(np.nan),
        "threshold_max": threshold_SE.max(axis=1).astype(np.float64).filled(np.nan),
        "cutoff_gap": np.ma.masked_invalid(gap_SE).mean(axis=1).filled(np.nan),
        "dead_experts": (usage_SE == 0).sum(axis=1).astype(np.float64),
        "capacity_bound_share": traced.at_bound_SE.mean(axis=1, dtype=np.float64),
    }


def summarise(data: RunData, histories: list[LayerHistory], last_steps: int | None = None) -> Summary:
    """The numbers of a report.

    The window is the last `last_steps` logged steps of the threshold phase, by default its last 20 %. A run
    that has not reached that phase shows the phase that it has reached instead.
    """
    training = data.tensorboard.scalars.get(TRAINING_LOSS)
    seconds = data.tensorboard.scalars.get(SECONDS_PER_STEP)
    num_experts, topk = _experts_and_topk(data)
    window = _window(data, histories, last_steps)
    validation = data.tensorboard.validation_losses()
    logged = [history.steps_S for history in histories]
    logged += [series.steps_S for series in (training, *validation.values()) if series]
    # A run may have logged neither: any scalar then says how far it came.
    logged = logged or [series.steps_S for series in data.tensorboard.scalars.values()]
    monitor = Monitor()
    for seen in data.trace.observations() if data.trace else ():
        monitor.observe(seen)
    return Summary(
        schema=SUMMARY_SCHEMA,
        run=data.name,
        last_step=int(max(steps_S[-1] for steps_S in logged)),
        tokens=_tokens(data),
        num_experts=num_experts,
        topk=topk,
        target_rate=topk / num_experts if topk and num_experts else None,
        training_loss=_final(training) if training else None,
        training_loss_recent=_recent(training),
        validation_losses={name: _final(loss) for name, loss in validation.items()},
        seconds_per_step=float(np.median(seconds.values_S)) if seconds else None,
        warmup_end=_first_step_after(data, "warmup"),
        threshold_start=_first_step_after(data, "anneal"),
        window=window,
        layers=[_layer_summary(history, window) for history in histories] if window else [],
        alarms=monitor.active if data.trace else None,
        past_alarms=monitor.past,
        missing=data.missing,
        warnings=data.warnings,
    )


def in_window(history: LayerHistory, window: Window) -> NDArray[np.bool_]:
    """Which logged steps of a layer the window averages, [S]."""
    inside_S = (history.steps_S >= window.first_step) & (history.steps_S <= window.last_step)
    if history.experts is not None:
        inside_S &= history.experts.phases_S == window.phase
    return inside_S


def _tensorboard_histories(tensorboard: TensorBoard) -> list[LayerHistory]:
    pattern = re.compile(rf"moe/({'|'.join(METRICS)})_layer_(\d+)")
    found: dict[int, dict[str, Series]] = {}
    for tag, series in tensorboard.scalars.items():
        if match := pattern.fullmatch(tag):
            found.setdefault(int(match[2]), {})[match[1]] = series
    histories = []
    for layer, by_metric in sorted(found.items()):
        steps_S = np.unique(np.concatenate([series.steps_S for series in by_metric.values()]))
        metrics: dict[str, Floats] = {name: np.full(steps_S.size, np.nan) for name in METRICS}
        for name, series in by_metric.items():
            metrics[name][np.searchsorted(steps_S, series.steps_S)] = series.values_S
        histories.append(LayerHistory(layer, steps_S, metrics, None))
    return histories


def _window(data: RunData, histories: list[LayerHistory], last_steps: int | None) -> Window | None:
    if not histories:
        return None
    phase = None
    if data.trace is not None:
        phase = max(data.trace.phases_S, key=PHASES.index)
        steps_S = data.trace.steps_S[data.trace.phases_S == phase]
    else:
        steps_S = np.unique(np.concatenate([history.steps_S for history in histories]))
    count = math.ceil(DEFAULT_WINDOW_SHARE * steps_S.size) if last_steps is None else last_steps
    chosen_S = steps_S[-count:]
    return Window(phase and str(phase), int(chosen_S[0]), int(chosen_S[-1]), int(chosen_S.size))


def _layer_summary(history: LayerHistory, window: Window) -> LayerSummary:
    inside_S = in_window(history, window)
    means: dict[str, Any] = {}
    for name, values_S in history.metrics.items():
        known = values_S[inside_S & np.isfinite(values_S)]
        means[name] = float(known.mean()) if known.size else None
    return LayerSummary(layer=history.layer, **means)


def _final(loss: Series) -> FinalLoss:
    return FinalLoss(int(loss.steps_S[-1]), float(loss.values_S[-1]))


def _recent(loss: Series | None) -> float | None:
    if loss is None or loss.values_S.size < RECENT_LOSSES:
        return None
    return float(loss.values_S[-RECENT_LOSSES:].mean())


def _experts_and_topk(data: RunData) -> tuple[int | None, int | None]:
    if data.trace is not None:
        return data.trace.num_experts, data.trace.topk
    num_experts = data.tensorboard.argument("num_experts")
    # Megatron has a default for top-k in dense models too.
    return num_experts, data.tensorboard.argument("moe_router_topk") if num_experts else None


def _tokens(data: RunData) -> int | None:
    length = data.tensorboard.argument("seq_length")
    if length is not None and data.tensorboard.samples is not None:
        return length * data.tensorboard.samples
    if data.trace is None:
        return None
    steps_since_last_S = np.diff(data.trace.steps_S, prepend=0)
    return int((data.trace.tokens_S * steps_since_last_S).sum())


def _first_step_after(data: RunData, phase: str) -> int | None:
    """First logged step of a later phase than `phase`, if an earlier one was logged too."""
    if data.trace is None:
        return None
    later_S = np.array([PHASES.index(name) > PHASES.index(phase) for name in data.trace.phases_S])
    return int(data.trace.steps_S[later_S.argmax()]) if later_S.any() and not later_S[0] else None


def _divide(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Quotient with NaN where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)

"""Every number of the report, as rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from benchmarks import threshold_series
from benchmarks.scale import boundary, check, cost, memory, published
from benchmarks.scale.assumptions import Hardware
from benchmarks.scale.loads import Drawn, Rule, Text, capacity_band
from benchmarks.scale.measure import Measured, numbers
from benchmarks.scale.network import fit
from benchmarks.scale.shapes import GPUS, SEQUENCE, SHAPES, Placement, place
from benchmarks.streams import NORMAL
from benchmarks.threshold_series import Lane, predicted_rms

LOAD_GPUS = 1024
"""Loads are shown for this many GPUs: they depend on the layout, and that on the number hardly."""
STEPS, PROBABILITY = 100_000, 1e-3
"""A run's length, and the chance that it ever runs out of memory."""
CAPACITIES = (0.1, 0.25, 0.5, 1.0)
BETA, DRIFT = 0.99, 1e-4
"""Of the thresholds; drift in sd of the logits a batch."""
UNEVEN = Text(own=0.5**2 / (1.0 + 0.5**2))
"""docs/choosing.md: all tokens of a sequence share an offset of half the sd that they differ by."""


class Row(NamedTuple):
    """One number of scale_model.csv."""

    table: str
    shape: str
    gpus: int
    setting: str
    quantity: str
    value: float


@dataclass(frozen=True)
class Setting:
    """A rule on a text."""

    name: str
    rule: Rule
    text: Text


AS_PUBLISHED = "top-k + aux loss, busiest rank as published"


def settings(measured: Sequence[Measured]) -> list[Setting]:
    """What loads are simulated for: without thresholds' errors, which depend on the shape."""
    return [
        Setting("ET, independent tokens", "ET", Text()),
        Setting("ET, text of the tiny GPT", "ET", mean_text(measured, "ET")),
        Setting("ET, uneven text (0.5 sd)", "ET", UNEVEN),
        Setting("top-k, independent tokens", "top-k", Text()),
        Setting("top-k + aux loss, text of the tiny GPT", "top-k", mean_text(measured, "top-k")),
    ]


def mean_text(measured: Sequence[Measured], router: str) -> Text:
    """Of both runs of a router; thresholds at scale have errors of their own, so that ET's are left out."""
    texts = [numbers(measured, "text", router, ranks) for ranks in (2, 4)]
    mean = Text(**{name: float(np.mean([text[name] for text in texts])) for name in texts[0]})
    return replace(mean, wander=0.0, sway=0.0, level=1.0) if router == "ET" else mean


def threshold_error(placement: Placement, text: Text, *, beta: float = BETA, drift: float = DRIFT) -> float:
    """Rms of an expert's load at its threshold, relative, in closed form (docs/choosing.md)."""
    shape = placement.shape
    rate = shape.topk / shape.experts
    lane = Lane(
        tokens=placement.layout.sequences * SEQUENCE,
        rate=rate,
        unevenness=float(np.sqrt(text.own * SEQUENCE / threshold_series.UNEVEN_TOKENS)),
    )
    return predicted_rms(lane, drift, beta) * NORMAL.load_slope(rate)


def settled(placement: Placement, setting: Setting) -> Setting:
    """With the error that thresholds have at this scale."""
    if setting.rule == "top-k":
        return setting
    error = threshold_error(placement, setting.text)
    return replace(setting, text=replace(setting.text, wander=error))


def shape_rows() -> Iterator[Row]:
    """Sizes and placements."""
    for shape in SHAPES:
        yield Row("shape", shape.name, 0, "", "total", shape.parameters() / 1e9)
        yield Row("shape", shape.name, 0, "", "active", shape.active / 1e9)
        yield Row("shape", shape.name, 0, "", "GFLOP a token", shape.flops() / 1e9)
        yield Row("shape", shape.name, 0, "", "expert share", shape.expert_flops / shape.flops())
        for gpus in GPUS:
            placement = place(shape, gpus)
            layout = placement.layout
            for name, value in (
                ("pipeline stages", layout.pp),
                ("sequences", layout.sequences),
                ("step", placement.step_seconds),
                ("static GB", placement.static_bytes / 1e9),
            ):
                yield Row("placement", shape.name, gpus, "", name, value)


def statistics_rows(hardware: Hardware) -> Iterator[Row]:
    """Cost of the statistics."""
    for shape in SHAPES:
        for gpus in GPUS:
            found = cost.statistics(place(shape, gpus), hardware)
            values = {
                "reduced MB": found.reduced_bytes / 1e6,
                "memory MB": found.memory_bytes / 1e6,
                **{f"{name} ms": 1e3 * seconds for name, seconds in found.reduce_seconds.items()},
                "boundary ms": 1e3 * found.boundary_seconds,
                "once share": found.share(),
                "share of the boundary": found.boundary_seconds / found.step_seconds,
                **{f"share with {name}": found.share(name) for name in found.counting_seconds},
            }
            for name, value in values.items():
                yield Row("statistics", shape.name, gpus, found.best_algorithm, name, value)


AS_IT_IS = cost.COUNT_BYTES, boundary.BINS
FEW_KERNELS = {"kernel_launch": 0.1}
#: What is varied -> factors of assumptions, bytes of a count, bins.
VARIED: dict[str, tuple[dict[str, float], int, int]] = {
    "as assumed": ({}, *AS_IT_IS),
    "NICs at half the speed": ({"nic": 0.5}, *AS_IT_IS),
    "hops 4 times as long": ({"nic_hop": 4.0, "nvlink_hop": 4.0}, *AS_IT_IS),
    "hops half as long": ({"nic_hop": 0.5, "nvlink_hop": 0.5}, *AS_IT_IS),
    "small kernels half as long": ({"kernel_launch": 0.5}, *AS_IT_IS),
    "small kernels twice as long": ({"kernel_launch": 2.0}, *AS_IT_IS),
    "HBM at half the speed": ({"hbm_efficiency": 0.5}, *AS_IT_IS),
    "int64 counts, 1,024 bins": ({}, 8, 1024),
    "int16 counts, 256 bins": ({}, 2, 256),
    "a tenth of the kernels": (FEW_KERNELS, *AS_IT_IS),
}


def sensitivity_rows(hardware: Hardware) -> Iterator[Row]:
    """Share of reduction and boundary on the most GPUs when something is different."""
    for shape in SHAPES:
        placement = place(shape, GPUS[-1])
        layout = placement.layout
        larger = replace(placement, layout=replace(layout, sequences=4 * layout.sequences))
        shares = {}
        for name, (factors, count_bytes, bins) in VARIED.items():
            found = cost.statistics(
                placement, hardware.changed(**factors), count_bytes=count_bytes, bins=bins
            )
            shares[name] = found.share()
            hidden = "the reduction hidden"
            if name in ("as assumed", "a tenth of the kernels"):
                what = hidden if name == "as assumed" else f"{name}, {hidden}"
                shares[what] = found.boundary_seconds / found.step_seconds
        shares["global batch 4 times as large"] = cost.statistics(larger, hardware).share()
        for name, share in shares.items():
            yield Row("sensitivity", shape.name, GPUS[-1], name, "once share", share)


def load_rows(chosen: Sequence[Setting], hardware: Hardware, draws: int) -> Iterator[Row]:
    """Imbalance and what it costs."""
    for shape in SHAPES:
        placement = place(shape, LOAD_GPUS)
        for setting in chosen:
            real = settled(placement, setting)
            drawn = cost.drawn_loads(placement, real.rule, real.text, draws)
            for gpus in GPUS:
                slow = cost.slowdown(place(shape, gpus), hardware, drawn)
                for name, value in vars(slow).items():
                    yield Row("loads", shape.name, gpus, setting.name, name, value)
            total = float(drawn.receive_DR.mean(axis=1).std())
            yield Row("loads", shape.name, LOAD_GPUS, setting.name, "total sd", total)
        base = cost.exposure(placement, hardware)
        # Nothing says how it depends on the experts of a rank: it is taken as it is.
        natural = cost.slowed(base, *[published.implied(hardware)] * 2)
        for name, value in vars(natural).items():
            yield Row("published loads", shape.name, LOAD_GPUS, AS_PUBLISHED, name, value)
        yield Row("exposure", shape.name, LOAD_GPUS, "", "grouped GEMM", base.grouped_gemm / base.step)
        yield Row("exposure", shape.name, LOAD_GPUS, "", "all-to-all", base.all_to_all / base.step)


def threshold_rows() -> Iterator[Row]:
    """Load error of thresholds."""
    for shape in SHAPES:
        placement = place(shape, LOAD_GPUS)
        for name, text in (("independent", Text()), ("uneven", UNEVEN)):
            for beta in (0.9, 0.99, 0.999):
                for drift in (0.0, 1e-5, 1e-4):
                    error = threshold_error(placement, text, beta=beta, drift=drift)
                    setting = f"{name}, drift {drift:g}"
                    yield Row("thresholds", shape.name, LOAD_GPUS, setting, f"beta {beta}", error)


def head_room_rows(chosen: Sequence[Setting]) -> Iterator[Row]:
    """Memory of routed rows and head-room."""
    for shape in SHAPES:
        placement = place(shape, LOAD_GPUS)
        group = cost.group_of(placement)
        stored = placement.stage_routers * placement.layout.pp * group.target
        for kept in memory.KEPT:
            size = stored * kept.row_bytes(shape.hidden, shape.expert_width) / 1e9
            yield Row("rows", shape.name, LOAD_GPUS, kept.name, "GB at the mean", size)
        occasions = float(LOAD_GPUS * STEPS * placement.micro_batches)
        # The first stage of a pipeline holds as many micro-batches as there are stages.
        layers, held = placement.stage_routers, placement.layout.pp
        for setting in chosen:
            text, popular = setting.text, (1.0, 1.0)
            if setting.rule == "top-k":
                popular = most_popular(placement, text.wander)
                text = Text(own=text.own)
            kept = held * memory.cumulants(group, text, layers, popular[0])
            one = memory.cumulants(group, text, 1, popular[1])
            rooms = {
                "kept": memory.head_room(kept, held * layers * group.target, occasions, PROBABILITY),
                "one layer": memory.head_room(one, group.target, layers * occasions, PROBABILITY),
            }
            for name, room in rooms.items():
                # No expert can take more than every token.
                limited = min(room, shape.experts / shape.topk)
                yield Row("head-room", shape.name, LOAD_GPUS, setting.name, name, limited)


def most_popular(placement: Placement, wander: float) -> tuple[float, float]:
    """Expected load of the rank with the most popular experts, over the mean: all layers summed, and of the
    worst layer. Simulated: popularity is lognormal and stays as it is."""
    shape, ranks = placement.shape, placement.layout.ep
    rng = np.random.default_rng(4)
    width = np.sqrt(np.log1p(wander**2))
    shape_of = (200, shape.moe_layers, ranks, shape.experts // ranks)
    load = np.exp(width * rng.standard_normal(shape_of) - 0.5 * width**2).mean(axis=3)
    load /= load.mean(axis=2, keepdims=True)
    return float(load.mean(axis=1).max(axis=1).mean()), float(load.max(axis=(1, 2)).mean())


def capacity_rows(chosen: Sequence[Setting], hardware: Hardware, draws: int) -> Iterator[Row]:
    """What a capacity does to ET."""
    for shape in SHAPES:
        placement = place(shape, LOAD_GPUS)
        for setting in (one for one in chosen if one.rule == "ET"):
            real = settled(placement, setting)
            free = cost.drawn_loads(placement, "ET", real.text, draws)
            for capacity in CAPACITIES:
                bounded = cost.drawn_loads(placement, "ET", real.text, draws, capacity=capacity)
                slow = cost.slowdown(placement, hardware, bounded)
                values = {**moved(free, capacity), "busiest rank": slow.grouped_gemm}
                for name, value in values.items():
                    yield Row(f"C={capacity}", shape.name, LOAD_GPUS, setting.name, name, value)


def moved(drawn: Drawn, capacity: float) -> dict[str, float]:
    """What the bounds do to these loads, as shares of experts and of rows."""
    fewest, most = capacity_band(drawn.group, capacity)
    counts, rows = drawn.counts_DREE, drawn.counts_DREE.sum()
    return {
        "acts": float(((counts > most) | (counts < fewest)).mean()),
        "dropped": float((counts - most).clip(min=0.0).sum() / rows),
        "filled": float((fewest - counts).clip(min=0.0).sum() / rows),
    }


def check_rows(measured: Sequence[Measured], hardware: Hardware, draws: int) -> Iterator[Row]:
    """The model beside what was measured: quantity 'measured' and predictions."""
    yield from _gloo_rows(measured)
    yield from _run_rows(measured)
    tiny, uneven = mean_text(measured, "top-k"), published.uneven_sequences(hardware, draws)
    busiest = published.implied(hardware)
    for point in published.POINTS:
        values = {
            "published": point.slowdown,
            "implied busiest rank": point.implied(hardware),
            "one busiest rank": point.predicted(hardware, busiest),
            "uneven sequences": point.predicted(hardware, point.simulated(uneven, draws)),
            "text of the tiny GPT": point.predicted(hardware, point.simulated(tiny, draws)),
        }
        name = f"sequences of {point.sequence}"
        for quantity, value in values.items():
            yield Row("natural routing", published.SHAPE.name, 256, name, quantity, value)
    yield Row("natural routing", published.SHAPE.name, 256, "", "one busiest rank", busiest)
    yield Row("natural routing", published.SHAPE.name, 256, "", "own of uneven sequences", uneven.own)


def _gloo_rows(measured: Sequence[Measured]) -> Iterator[Row]:
    names = list(dict.fromkeys(row.setting for row in measured if row.kind == "routers"))
    for ranks in (2, 4):
        vectors = {float(size): value for size, value in numbers(measured, "vector", "", ranks).items()}
        line = fit(list(vectors), list(vectors.values()))
        yield Row("gloo", "", ranks, "", "latency ms", 1e3 * line.latency)
        yield Row("gloo", "", ranks, "", "MB/s", line.speed / 1e6)
        errors = [line.seconds(size) / seconds - 1.0 for size, seconds in vectors.items()]
        yield Row("gloo", "", ranks, "", "largest error of the line", float(np.abs(errors).max()))
        for name in names:
            times = numbers(measured, "routers", name, ranks)
            yield Row("gloo", "", ranks, name, "MB", times["bytes"] / 1e6)
            yield Row("gloo", "", ranks, name, "measured ms", 1e3 * (times["group"] - times["alone"]))
            yield Row("gloo", "", ranks, name, "predicted ms", 1e3 * line.seconds(times["bytes"]))


def _run_rows(measured: Sequence[Measured]) -> Iterator[Row]:
    for router, rule in (("ET", "ET"), ("top-k", "top-k")):
        for ranks in (2, 4):
            texts = {
                "measured": None,
                "predicted": Text(**numbers(measured, "text", router, ranks)),
                "predicted from the other run": Text(**numbers(measured, "text", router, 6 - ranks)),
                "predicted, independent tokens": Text(),
            }
            for quantity, value in numbers(measured, "text", router, ranks).items():
                yield Row("text", router, ranks, "", quantity, value)
            for name, text in texts.items():
                values = (
                    numbers(measured, "load", router, ranks)
                    if text is None
                    else check.summary(check.predicted(rule, ranks, text))
                )
                for quantity, value in values.items():
                    yield Row(name, router, ranks, "", quantity, value)
    capped = "ET, C=0.5"
    for quantity, value in numbers(measured, "load", capped, 4).items():
        yield Row("measured", capped, 4, "", quantity, value)
    text = Text(**numbers(measured, "text", "ET", 4))
    for quantity, value in check.summary(check.predicted("ET", 4, text, check.CAPACITY)).items():
        yield Row("predicted", capped, 4, "", quantity, value)
    free = check.summary(check.predicted("ET", 4, text))["experts outside (1+-0.5)k"]
    yield Row("predicted", capped, 4, "", "at capacity bound, traced", free)

"""How exact thresholds are, how long they need, and what would help them after a jump.

    python benchmarks/quantile_error.py [--quick] [--seed N] [--output DIR] [--cases GLOB]

writes quantile_error.csv (one row a case), quantile_error.md (tables) and quantile_error.png from synthetic
logits whose population is known. The same seed gives the same csv. Errors are of the load of the population
at a cutoff or threshold: selected / k - 1. See pool_estimates.py for single batches, threshold_series.py
for thresholds over time, guards.py for the prototypes of guards, streams.py for the logits.
"""

import argparse
import csv
import fnmatch
import itertools
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# As a script this file has its own folder on the path, not the one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import guards, pool_estimates, threshold_series
from benchmarks.quantile_report import write_plot, write_tables
from benchmarks.streams import Stream
from benchmarks.threshold_series import BETAS, Lane, constant, drifting, young

type Row = dict[str, Any]

SIZES = (1 << 12, 1 << 16, 1 << 20)
DRIFTS = (0.0, 1e-4, 1e-3, 1e-2)
STREAMS = {
    "t(3)": Stream("t3"),
    "bimodal": Stream("bimodal"),
    "narrow, offset 10": Stream(center=10.0, sd=0.01),
}
GUARD_BETAS = (0.9, 0.99, 0.999)


def estimator_rows(quick: bool, seed: int) -> Iterator[Row]:
    """Single batches, one sweep at a time around the centre."""
    for sweep, value, pool, drawn in pool_estimates.sweeps(quick):
        batches = (1 if quick else 4) if drawn else (2 if quick else 16)
        case_seed = zlib.crc32(f"{seed} {sweep} {value}".encode())
        for row in pool_estimates.measure(pool, case_seed, batches, drawn=drawn):
            yield {
                "case": "estimator",
                "sweep": sweep,
                "value": value,
                "tokens": pool.tokens,
                "ranks": pool.ranks,
                "microbatch": pool.microbatch,
                "experts": pool.experts,
                "topk": pool.topk,
                "k": pool.k,
            } | row


def _settled(
    name: str, settings: list[tuple[Row, Lane]], betas: tuple[float, ...], batches: int, seed: int
) -> Iterator[Row]:
    lanes = [lane for _, lane in settings]
    results = threshold_series.settled_rows(lanes, betas, batches, seed)
    for (labels, lane), rows in zip(settings, results, strict=True):
        for beta, row in zip(betas, rows, strict=True):
            predicted = threshold_series.predicted_rms(lane, labels["drift"], beta)
            yield (
                {
                    "case": name,
                    "estimator": lane.estimator,
                    "tokens": lane.tokens,
                    "microbatch": lane.tokens // lane.parts,
                    "k": lane.k,
                    "beta": beta,
                    "predicted_rms": predicted,
                }
                | labels
                | row
            )


def settled_rows(quick: bool, seed: int) -> Iterator[Row]:
    """Noise and lag of settled thresholds: batch size, rate and shape against drift and beta."""
    settings = []
    for drift, tokens in itertools.product(DRIFTS, SIZES):
        labels = {"sweep": "pool", "value": tokens, "drift": drift}
        settings.append((labels, Lane(tokens=tokens, mean=drifting(drift))))
    for drift, share in itertools.product((0.0, 1e-3), (8, 64, 256)):
        labels = {"sweep": "rate", "value": f"1/{share}", "drift": drift}
        settings.append((labels, Lane(rate=1 / share, mean=drifting(drift))))
    for drift, (shape, stream) in itertools.product((0.0, 1e-5, 1e-4), STREAMS.items()):
        labels = {"sweep": "shape", "value": shape, "shape": shape, "drift": drift}
        settings.append((labels, Lane(stream=stream, mean=drifting(drift))))
    yield from _settled("settled", settings, BETAS[:3] if quick else BETAS, 1500 if quick else 60_000, seed)


def settled_estimator_rows(quick: bool, seed: int) -> Iterator[Row]:
    """The estimators' biases in settled thresholds: what an EMA does not average away."""
    settings = []
    for drift, parts, name in itertools.product((0.0, 1e-3), (16, 256), pool_estimates.ESTIMATORS):
        if parts == 16 or name in ("kth-largest", "megatron-average"):
            labels = {"sweep": "estimator", "value": f"{(1 << 16) // parts} tokens a part", "drift": drift}
            settings.append((labels, Lane(estimator=name, parts=parts, mean=drifting(drift))))
    yield from _settled("settled estimator", settings, BETAS[:3], 300 if quick else 2000, seed)


def optimum_rows(quick: bool, seed: int) -> Iterator[Row]:
    """Threshold errors over a grid of betas, and the best against the closed form's."""
    betas = tuple(1.0 - 2.0**-j for j in range(9 if quick else 14))
    settings = []
    for uneven, tokens, drift in itertools.product((0.0, 0.5), SIZES, (1e-6, 1e-5, *DRIFTS[1:])):
        labels = {"sweep": "grid", "value": drift, "drift": drift, "unevenness": uneven}
        settings.append((labels, Lane(tokens=tokens, mean=drifting(drift), unevenness=uneven)))
    rows = list(_settled("optimum", settings, betas, 2000 if quick else 50_000, seed))
    yield from rows
    for (labels, lane), grid in zip(settings, itertools.batched(rows, len(betas)), strict=True):
        rate = threshold_series.best_rate(lane, labels["drift"])
        best = min(grid, key=lambda row: row["threshold_rms"])
        # The grid's neighbours of the closed form are a factor of 2 apart: the nearer one in that measure.
        near = min(grid, key=lambda row: max(rate / (1.0 - row["beta"]), (1.0 - row["beta"]) / rate))
        yield (
            {
                "case": "optimum",
                "tokens": lane.tokens,
                "k": lane.k,
                "closed_form_beta": 1.0 - rate,
                "best_beta": best["beta"],
                "rms_at_best": best["threshold_rms"],
                "rms_at_closed_form": near["threshold_rms"],
                "load_rms": near["load_rms"],
            }
            | labels
            | {"sweep": "best"}
        )


def warmup_rows(quick: bool, seed: int) -> Iterator[Row]:
    """Batches until a new threshold's load error is within 5 % and 1 %."""
    means = {"still": constant(0.0), "young 0.1": young(0.1), "young 1": young(1.0)}
    settings = list(itertools.product((0.0, 0.5), means, SIZES))
    lanes = [Lane(tokens=tokens, mean=means[mean], unevenness=uneven) for uneven, mean, tokens in settings]
    betas, batches = (BETAS[:3], 1500) if quick else (BETAS, 60_000)
    results = threshold_series.batches_until(lanes, betas, batches, seed, (0.05, 0.01), settled=False)
    for (uneven, mean, tokens), rows in zip(settings, results, strict=True):
        labels = {"case": "warm-up", "event": mean, "tokens": tokens, "k": tokens // 16, "unevenness": uneven}
        for beta, row in zip(betas, rows, strict=True):
            yield labels | {"beta": beta} | row


def recovery_rows(quick: bool, seed: int) -> Iterator[Row]:
    """After an event, with the package's `ThresholdEMA` as it is."""
    settings = list(itertools.product(SIZES, guards.EVENTS))
    events = guards.EVENTS
    lanes = [
        Lane(tokens=tokens, mean=event.mean, sd=event.sd, unevenness=event.unevenness)
        for tokens, event in itertools.product(SIZES, events.values())
    ]
    betas, batches = (BETAS[:3], 700) if quick else (BETAS, 60_000)
    results = threshold_series.batches_until(lanes, betas, batches, seed, (0.1,), settled=True)
    for (tokens, name), rows in zip(settings, results, strict=True):
        for beta, row in zip(betas, rows, strict=True):
            yield {"case": "recovery", "event": name, "tokens": tokens, "k": tokens // 16, "beta": beta} | row


def _guard_rows(
    name: str, simulation: Callable[..., list[list[Row]]], events: Any, quick: bool, batches: int, seed: int
) -> Iterator[Row]:
    betas = GUARD_BETAS[1:2] if quick else GUARD_BETAS
    policies = list(itertools.product(betas, guards.GUARDS))
    conditions = list(itertools.product(SIZES, events))
    results = simulation(policies, SIZES, list(events.values()), batches, seed)
    for (tokens, event), rows in zip(conditions, results, strict=True):
        for (beta, guard), row in zip(policies, rows, strict=True):
            yield {
                "case": name,
                "event": event,
                "tokens": tokens,
                "k": tokens // 16,
                "beta": beta,
                "guard": guard.name,
                "band": guard.band,
            } | row


def guard_still_rows(quick: bool, seed: int) -> Iterator[Row]:
    """What guards do when nothing happens: false alarms and noise."""
    yield from _guard_rows(
        "guard, still", guards.stationary, guards.STILL, quick, 500 if quick else 20_000, seed
    )


def guard_recovery_rows(quick: bool, seed: int) -> Iterator[Row]:
    """What guards gain after an event."""
    yield from _guard_rows(
        "guard, event", guards.recovery, guards.EVENTS, quick, 700 if quick else 6000, seed
    )


CASES: dict[str, Callable[[bool, int], Iterator[Row]]] = {
    "estimator": estimator_rows,
    "settled": settled_rows,
    "settled estimator": settled_estimator_rows,
    "optimum": optimum_rows,
    "warm-up": warmup_rows,
    "recovery": recovery_rows,
    "guard, still": guard_still_rows,
    "guard, event": guard_recovery_rows,
}


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row, empty where a column does not apply or a limit was not reached; 4 digits."""
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that match and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within a minute; fewer betas, rougher numbers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--cases", default="*", metavar="GLOB", help=f"of: {', '.join(CASES)}")
    args = parser.parse_args(arguments)
    chosen = [name for name in CASES if fnmatch.fnmatch(name, args.cases)]
    if not chosen:
        parser.error(f"--cases {args.cases}: none of {', '.join(CASES)}")
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    start = time.perf_counter()
    for name in chosen:
        began = time.perf_counter()
        rows += CASES[name](args.quick, zlib.crc32(f"{args.seed} {name}".encode()))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    path = args.output / "quantile_error.csv"
    write_csv(path, rows)
    how = f"seed {args.seed}{', --quick' if args.quick else ''}, {time.perf_counter() - start:.0f} s"
    write_tables(path, path.with_suffix(".md"), how)
    write_plot(path, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

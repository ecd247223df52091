"""How well each estimator finds the cutoff of one global batch.

`histogram`         the quantile of the whole global batch (`quantile.Histogram`)
`kth-largest`       the paper's: the mean over micro-batches and ranks of each one's k-th largest
`megatron-average`  as Megatron-LM's main branch (d98e8a6) averages for --moe-router-load-balancing-type
                    quantile_balancing, applied to logits
`exact`             the k-th largest of all logits gathered: the reference

What Megatron-LM averages: every forward pass of a micro-batch gathers its logits over the TP x CP group (so
that the part is whole sequences; the DP ranks stay apart), takes of each token the margin to its (topk +
1)-th best biased logit, and of each expert the (k + 1)-th largest margin, k = T * topk / E of that gathered
micro-batch: an order statistic, no interpolation. These are averaged over the micro-batches of a rank, then
once per global batch with equal weight over the DP x CP group. The bias is replaced by this mean by default
(moe_router_quantile_balancing_ema = 0), or is an EMA with that decay, from zero and without bias
correction; at last its mean over experts is subtracted, which top-k does not see.

So it is `kth-largest` with rank k + 1 and parts that are larger by TP x CP. Modelled here are these two
differences. Left out are the margins (a threshold is compared with logits, not with margins) and the
subtracted mean (it would move a threshold); an EMA from zero without correction is worse than
`ThresholdEMA` while it settles and the same later, so all estimators get `ThresholdEMA`.

Dimension letters: T tokens of a micro-batch on one rank, R ranks, M micro-batches, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.streams import NORMAL, Stream, histogram_cutoff, normal_tail, order_tails, part_mean
from megatron_et.rule.quantile import Histogram, kth_largest

ESTIMATORS = ("exact", "histogram", "kth-largest", "megatron-average")
CHUNK = 1 << 22
"""Part cutoffs drawn at once, to bound memory."""


@dataclass(frozen=True)
class Pool:
    """One global batch, its split, and the population that it is drawn from.

    Args:
        gathered_ranks: TP x CP, over which `megatron-average` gathers a micro-batch's logits.
        skew: sd, in sd of the logits, of the offset that every expert's logits have on a rank.
        skew_moves: every micro-batch draws its offsets anew, instead of one offset per rank for good.
    """

    tokens: int = 1 << 16
    ranks: int = 8
    microbatch: int = 1 << 12
    experts: int = 128
    topk: int = 8
    stream: Stream = NORMAL
    gathered_ranks: int = 1
    skew: float = 0.0
    skew_moves: bool = False

    @property
    def microbatches(self) -> int:
        """M, per rank."""
        return self.tokens // (self.ranks * self.microbatch)

    @property
    def k(self) -> int:
        """Target tokens of one expert in the whole pool."""
        return self.tokens * self.topk // self.experts

    def parts(self, gathered_ranks: int = 1) -> tuple[int, int, int]:
        """Number of parts, tokens of one, and its k, when each micro-batch is gathered over some ranks."""
        tokens = self.microbatch * gathered_ranks
        return self.tokens // tokens, tokens, tokens * self.topk // self.experts


def load_error(pool: Pool, cutoffs_E: torch.Tensor, offsets_RE: torch.Tensor) -> torch.Tensor:
    """Load of the population at each cutoff over its target, less 1, [E] fp64."""
    if pool.skew_moves:
        # Offsets are drawn anew for ever: together with the (normal) logits they make one wider normal.
        tails_E = normal_tail(cutoffs_E.double() / (1.0 + pool.skew**2) ** 0.5)
    else:
        tails_E = pool.stream.tail(cutoffs_E - offsets_RE).mean(dim=0)
    return tails_E * pool.tokens / pool.k - 1.0


def drawn_cutoffs(
    pool: Pool, offsets_RE: torch.Tensor, centers_E: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Every estimator's cutoffs [E] from the same tokens, by the package's classes."""
    histogram = Histogram(pool.experts, centers=centers_E)
    parts = []
    for _ in range(pool.microbatches):
        for offset_E in offsets_RE.float():
            logits_TE = pool.stream.sample((pool.microbatch, pool.experts), generator)
            if pool.skew_moves:
                offset_E = pool.skew * torch.randn(pool.experts, generator=generator)
            logits_TE += pool.stream.sd * offset_E
            histogram.add(logits_TE)
            parts.append(logits_TE)
    number, _, part_k = pool.parts(pool.gathered_ranks)
    gathered = torch.cat(parts)
    return {
        "exact": kth_largest(gathered, pool.k),
        "histogram": histogram.kth_largest(pool.k),
        "kth-largest": _mean_of_kth_largest(parts, pool.topk, pool.experts),
        "megatron-average": sum(kth_largest(part, part_k + 1).double() for part in gathered.chunk(number))
        / number,
    }


def _mean_of_kth_largest(parts: Sequence[torch.Tensor], topk: int, experts: int) -> torch.Tensor:
    """The paper's estimator: the mean over micro-batches and ranks of each one's k-th largest logit."""
    cutoffs = [kth_largest(part, len(part) * topk // experts).double() for part in parts]
    return torch.stack(cutoffs).mean(dim=0)


def sampled_cutoffs(pool: Pool, rng: np.random.Generator, centers_E: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every estimator's cutoffs [E], each from an i.i.d. pool of its own whose tokens are not drawn."""

    def averaged(gathered_ranks: int, extra: int) -> torch.Tensor:
        number, tokens, k = pool.parts(gathered_ranks)
        rows = max(CHUNK // number, 1)
        sizes = [min(rows, pool.experts - start) for start in range(0, pool.experts, rows)]
        return torch.cat([part_mean(rng, pool.stream, tokens, k + extra, number, (size,)) for size in sizes])

    exact_tails_E = order_tails(rng, pool.tokens, [pool.k], (pool.experts,))[:, 0]
    return {
        "exact": pool.stream.logit(exact_tails_E),
        "histogram": histogram_cutoff(rng, pool.stream, pool.tokens, pool.k, centers_E),
        "kth-largest": averaged(1, 0),
        "megatron-average": averaged(pool.gathered_ranks, 1),
    }


def measure(pool: Pool, seed: int, batches: int, *, drawn: bool) -> Iterator[dict[str, Any]]:
    """One row per estimator: errors of the population's load at single batches' cutoffs.

    Args:
        drawn: token by token; otherwise by order statistics (i.i.d. pools only).
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    fixed_skew = 0.0 if pool.skew_moves else pool.skew
    offsets_RE = fixed_skew * torch.from_numpy(rng.standard_normal((pool.ranks, pool.experts)))
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in ESTIMATORS}
    # As in training: the histogram is centred on the cutoff of another batch.
    centers_E = pool.stream.logit(
        torch.full((pool.experts,), pool.k / pool.tokens, dtype=torch.float64)
    ).float()
    for batch in range(-1, batches):
        if drawn:
            cutoffs = drawn_cutoffs(pool, offsets_RE, centers_E, generator)
        else:
            cutoffs = sampled_cutoffs(pool, rng, centers_E)
        centers_E = cutoffs["histogram"].float()
        if batch >= 0:
            for name in ESTIMATORS:
                errors[name].append(load_error(pool, cutoffs[name], offsets_RE))
    exact_SE = torch.stack(errors["exact"])
    for name in ESTIMATORS:
        error_SE = torch.stack(errors[name])
        yield {
            "estimator": name,
            "method": "tokens" if drawn else "order statistics",
            "samples": error_SE.numel(),
            "load_bias": error_SE.mean().item(),
            "load_bias_se": (error_SE.std() / error_SE.numel() ** 0.5).item(),
            "load_rms": error_SE.square().mean().sqrt().item(),
            "max_violation": error_SE.amax(dim=1).mean().item(),
            # Another pool's exact cutoff says nothing about this one's.
            "rms_from_exact": (error_SE - exact_SE).square().mean().sqrt().item() if drawn else None,
        }


def sweeps(quick: bool) -> Iterator[tuple[str, str, Pool, bool]]:
    """(sweep, value, pool, drawn token by token) around the centre, `Pool`'s defaults."""
    center = Pool(tokens=1 << 13, microbatch=512) if quick else Pool()
    large = Pool(tokens=1 << 20, ranks=8)
    yield "center", "", center, True
    for exponent in (12, 14, 16, 18, 20, 22):
        pool = Pool(tokens=1 << exponent, microbatch=min(4096, (1 << exponent) // 8))
        yield "pool", str(pool.tokens), pool, False
    for microbatch in (256, 1024, 4096, 32768):
        yield "micro-batch", str(microbatch), replace(large, microbatch=microbatch), False
        if microbatch * 8 <= 1 << 17:
            gathered = replace(large, microbatch=microbatch, gathered_ranks=8)
            yield "micro-batch, TPxCP 8", str(microbatch), gathered, False
    for experts, topk in ((128, 16), (128, 8), (128, 2), (256, 1)):
        yield "rate", f"1/{experts // topk}", replace(center, experts=experts, topk=topk), not quick
    for skew in (0.0, 0.25, 0.5, 1.0, 2.0):
        yield "skew", str(skew), replace(center, skew=skew), True
    for ranks in (2, 8, 32):
        split = replace(center, ranks=ranks, microbatch=center.tokens // ranks, skew=0.5)
        yield "ranks at skew 0.5", str(ranks), split, True
    for skew in (0.25, 0.5, 1.0):
        yield "skew of micro-batches", str(skew), replace(center, skew=skew, skew_moves=True), True
    shapes = {
        "normal": NORMAL,
        "t(3)": Stream("t3"),
        "bimodal": Stream("bimodal"),
        "narrow, offset 10": Stream(center=10.0, sd=0.01),
    }
    for name, stream in shapes.items():
        yield "shape", name, replace(center, stream=stream), True

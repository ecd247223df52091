"""select.cu against the oracle, on whichever device it runs: quantile.kth_largest_of_several.

Dimension letters: T tokens, E experts.
"""

from dataclasses import dataclass

import torch

from megatron_et.rule.kernels.select import kth_largest
from megatron_et.rule.quantile import kth_largest_of_several
from tests.kernels.route_cases import laid_out


@dataclass(frozen=True)
class Case:
    """One pool and the k asked for, made from a seed."""

    tokens: int
    experts: int
    ks: tuple[int, ...] = (3,)
    seed: int = 0
    scale: float = 3.0
    center: float = 0.0
    levels: int | None = None
    """Different values among the logits; None: any."""
    padded: float = 0.0
    """Share of the tokens."""
    on_device: bool = False
    """k is a tensor."""
    odd_values: bool = True
    """NaN, infinities, zeros of both signs, subnormals and huge values are among the logits."""
    transposed: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "one-k": Case(100, 8),
    "two-k": Case(300, 24, ks=(9, 50)),
    "two-k-in-one-bucket": Case(300, 16, ks=(100, 101), scale=1e-6, center=5.0, odd_values=False),
    "the-same-k-twice": Case(90, 8, ks=(7, 7)),
    "k-on-device": Case(300, 16, ks=(20, 60), on_device=True),
    "padded": Case(300, 16, ks=(20, 60), padded=0.3),
    "padded-k-on-device": Case(300, 16, ks=(20, 60), padded=0.3, on_device=True),
    "only-padding": Case(70, 8, ks=(3, 9), padded=1.0),
    "nobody-wanted": Case(70, 8, ks=(0, 9)),
    "nobody-wanted-on-device": Case(70, 8, ks=(0, 9), on_device=True),
    "more-than-there-are": Case(70, 8, ks=(70, 2**40)),
    "all-equal": Case(300, 8, ks=(20, 60), levels=1, odd_values=False),
    "ties": Case(300, 8, ks=(20, 60), levels=3),
    "one-token": Case(1, 8, ks=(1,), odd_values=False),
    "huge": Case(70, 8, scale=1e37),
    "all-digits": Case(300, 16, ks=(1, 300), scale=1e-3, center=1.0, odd_values=False),
    "not-multiple-of-8": Case(37, 7, odd_values=False),
    "three-k": Case(37, 8, ks=(1, 2, 3), odd_values=False),
    "not-contiguous": Case(37, 8, transposed=True, odd_values=False),
    "bf16": Case(37, 8, dtype=torch.bfloat16, odd_values=False),
    "no-token": Case(0, 8),
}
LEFT_TO_TORCH = {"not-multiple-of-8", "three-k", "not-contiguous", "bf16", "no-token"}


def check(case: Case, device: str) -> None:
    """The same cutoffs, to the bit but for the sign of zero, twice in a row: on a GPU with one scratch."""
    t, e = case.tokens, case.experts
    generator = torch.Generator().manual_seed(case.seed)
    logits = torch.randn(t, e, generator=generator) * case.scale + case.center
    if case.levels is not None:
        logits = logits.view(-1)[torch.randint(case.levels, (t, e), generator=generator)]
    if case.odd_values and t > 0:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
        where = torch.randint(t * e, (min(t * e, 24),), generator=generator)
        logits.view(-1)[where] = odd[torch.randint(len(odd), where.shape, generator=generator)]
    logits = laid_out(logits.to(device, case.dtype), case.transposed)
    padding = (torch.rand(t, generator=generator) < case.padded).to(device) if case.padded else None
    ks = [torch.tensor(k, device=device) if case.on_device else k for k in case.ks]
    # For k on the device the oracle sorts, and NaN is the largest logit; topk spreads it over the rest.
    wanted = [torch.as_tensor(k, device=device) for k in ks]
    expected = kth_largest_of_several(logits, wanted, padding)
    for _ in range(2):
        found = kth_largest(logits, ks, padding)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

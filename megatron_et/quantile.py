"""Pool quantiles: which logit is the k-th largest of an expert.

Dimension letters: T tokens of the pool, E experts.
"""

import torch

type Count = int | torch.Tensor
"""A number of tokens: an int, or an int64 tensor that stays on its device."""


def expected_load(num_tokens: Count, topk: int, num_experts: int) -> Count:
    """k = floor(rho * N): tokens that one expert should take of a pool of N, with rho = topk / num_experts
    (eq. 4).

    Args:
        num_tokens: N, an int or an int64 tensor (a count of unpadded tokens that stays on the device).
    """
    return num_tokens * topk // num_experts


def kth_largest(
    logits_TE: torch.Tensor, k: Count, *, padding_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The k-th largest logit of every expert (column), exactly.

    A token whose logit equals the cutoff passes it (`>=`), so at least k tokens pass and, with ties at the
    cutoff, more.

    Args:
        logits_TE: [tokens, experts], any floating dtype.
        k: tokens wanted per expert, an int or a one-element int64 tensor. More than there are tokens means
            all of them; 0 (or an empty pool) means none, and the cutoff is +inf.
        padding_mask_T: [tokens] bool, True for tokens that do not belong to the pool.

    Returns:
        cutoffs [experts], dtype of the logits.
    """
    num_tokens, num_experts = logits_TE.shape
    if isinstance(k, int) and padding_mask_T is None:
        k = min(k, num_tokens)
        if k <= 0:
            return logits_TE.new_full((num_experts,), torch.inf)
        # Only the smallest of the k largest is wanted, so they need no order among themselves.
        return logits_TE.t().contiguous().topk(k, dim=1, sorted=False).values.amin(dim=1)

    if num_tokens == 0:
        return logits_TE.new_full((num_experts,), torch.inf)
    valid = num_tokens if padding_mask_T is None else num_tokens - padding_mask_T.sum()
    k = torch.minimum(
        torch.as_tensor(k, device=logits_TE.device), torch.as_tensor(valid, device=logits_TE.device)
    )
    if padding_mask_T is not None:
        logits_TE = logits_TE.masked_fill(padding_mask_T.unsqueeze(1), -torch.inf)
    descending_TE = logits_TE.sort(dim=0, descending=True).values
    row = (k.reshape(1, 1) - 1).clamp(min=0).expand(1, num_experts)
    return torch.where(k > 0, descending_TE.gather(0, row).squeeze(0), torch.inf)


def capacity_bounds(
    logits_TE: torch.Tensor,
    k: Count,
    capacity_factor: float,
    *,
    padding_mask_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits between which a threshold keeps an expert's load within [(1-C)k, (1+C)k] tokens (F.1).

    `upper` is the (1-C)k-th and `lower` the (1+C)k-th largest logit, both counts rounded down; upper >=
    lower. With C = 0 both are the k-th largest (Expert Choice); with C >= 1 `upper` is +inf, so no missing
    token is filled in.

    Returns:
        (lower, upper), each [experts].
    """

    def scaled(factor: float) -> Count:
        # float64 like the authors' int(k * (1 +- C)); a tensor k stays on its device.
        return int(k * factor) if isinstance(k, int) else (k.double() * factor).long()

    upper = kth_largest(logits_TE, scaled(max(1.0 - capacity_factor, 0.0)), padding_mask_T=padding_mask_T)
    if capacity_factor == 0.0:
        return upper, upper
    return kth_largest(logits_TE, scaled(1.0 + capacity_factor), padding_mask_T=padding_mask_T), upper

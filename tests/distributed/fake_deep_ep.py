"""A stand-in for DeepEP that moves tokens over gloo, holds its caller to DeepEP's contract, and keeps what it
was given.

Written from DeepEP's documented interface (the docstrings of Buffer in v1.2.1 and of its main branch, of
HybridEPBuffer in its hybrid-ep branch) and from the assertions of its C++ and CUDA sources: the arguments
that Megatron's fused_a2a.py passes, the same names, shapes and dtypes, and the same results up to the order
of rows. It takes fp32 tokens besides DeepEP's bf16, so that results can be compared closely.

Call `install()` before Megatron is imported.

Dimension letters: T tokens of this rank, R ranks of the group, S slots, N experts of the group, L of a rank,
H hidden size, M tokens received, P rows after the permutation.
"""

import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOST_SLOTS = 32  # EP_DEVICE_ASSERT(num_topk <= 32): a lane of a warp for each
TMA_BYTES = 16


class EventHandle:
    """Nothing: the CPU is always in time."""


@dataclass
class EventOverlap:
    """What dispatch and combine return, and take as `previous_event`."""

    event: EventHandle | None = None

    def current_stream_wait(self) -> None:
        """Wait for an event that was recorded, which only asynchronous calls do."""
        assert self.event is not None


def _check_stream(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> EventOverlap:
    if allocate_on_comm_stream:
        assert async_finish
        assert previous_event is not None
        assert previous_event.event is not None
    return EventOverlap(EventHandle() if async_finish else None)


def _check_tokens(x_TH: torch.Tensor) -> None:
    assert x_TH.dim() == 2
    assert x_TH.is_contiguous()
    assert x_TH.dtype in (torch.bfloat16, torch.float32)
    assert x_TH.shape[1] * x_TH.element_size() % TMA_BYTES == 0


def _gather(group: Any, payload: Any) -> list[Any]:
    """Every rank's payload, in the order of ranks."""
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, payload, group=group)
    return parts


@dataclass(frozen=True)
class Dispatched:
    """What one forward dispatch of Buffer was given."""

    experts_TS: torch.Tensor
    gates_TS: torch.Tensor


@dataclass(frozen=True)
class DispatchedMap:
    """What one forward dispatch of HybridEPBuffer was given."""

    map_TN: torch.Tensor
    gates_TN: torch.Tensor
    pad_multiple: int | None
    fused: bool


@dataclass(frozen=True)
class _Row:
    """Where a row of HybridEP's permuted tokens comes from: rank, token of that rank, expert of the group."""

    rank: int
    token: int
    expert: int


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 * hidden_bytes * num_ranks


class Buffer:
    """DeepEP's normal mode."""

    dispatched: list[Dispatched] = []  # noqa: RUF012 - one list for the process
    num_sms = 20

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert group.size() in (2, 4, 8)  # SWITCH_RANKS
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Half of them send, half receive."""
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        assert num_ranks > 1
        return _Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts by rank and expert, and which token goes to which rank."""
        ranks = self.group.size()
        assert topk_idx.dim() == 2
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert topk_idx.shape[1] <= MOST_SLOTS
        assert num_experts % ranks == 0
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        hits_TN = torch.nn.functional.one_hot(topk_idx + 1, num_experts + 1).sum(1)[:, 1:]
        assert hits_TN.max() <= 1 if hits_TN.numel() else True, "an expert twice in a row"
        in_rank_TR = hits_TN.reshape(-1, ranks, num_experts // ranks).any(dim=2)
        return (
            in_rank_TR.sum(0, dtype=torch.int32),
            None,
            hits_TN.sum(0, dtype=torch.int32),
            in_rank_TR,
            _check_stream(previous_event, async_finish, allocate_on_comm_stream),
        )

    def dispatch(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """Send each token once to each rank that holds an expert of it; with a handle, tokens alone."""
        event = _check_stream(previous_event, async_finish, allocate_on_comm_stream)
        _check_tokens(x)
        rank = self.group.rank()
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            in_rank_TR, _ = handle
            assert len(x) == len(in_rank_TR)
            sent = _gather(self.group, (x.detach(), in_rank_TR))
            return torch.cat([y[to[:, rank]] for y, to in sent]), None, None, None, None, event

        assert num_tokens_per_rank is not None
        assert num_tokens_per_rdma_rank is None  # one node
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape
        assert len(x) == len(topk_idx) == len(is_token_in_rank)
        Buffer.dispatched.append(Dispatched(topk_idx.clone(), topk_weights.detach().clone()))
        sent = _gather(self.group, (x.detach(), topk_idx, topk_weights.detach(), is_token_in_rank))
        mine = [tuple(part[to[:, rank]] for part in (y, e, w)) for y, e, w, to in sent]
        x_MH, experts_MS, gates_MS = (torch.cat(parts) for parts in zip(*mine, strict=True))
        received_R = torch.tensor([len(part[0]) for part in mine])
        local = len(num_tokens_per_expert) // self.group.size()
        here_MS = (experts_MS >= local * rank) & (experts_MS < local * (rank + 1))
        experts_MS = torch.where(here_MS, experts_MS - local * rank, -1)
        gates_MS = torch.where(here_MS, gates_MS, 0.0)
        counts = [int((experts_MS == i).sum()) for i in range(local)]
        return x_MH, experts_MS, gates_MS, counts, (is_token_in_rank, received_R), event

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send rows back and add them up, unweighted; weights, if any, are added up beside them."""
        event = _check_stream(previous_event, async_finish, allocate_on_comm_stream)
        _check_tokens(x)
        in_rank_TR, received_R = handle
        assert len(x) == received_R.sum()
        weights_MS = torch.empty(len(x), 0) if topk_weights is None else topk_weights.detach()
        assert weights_MS.dtype == torch.float32
        assert weights_MS.is_contiguous()
        assert len(weights_MS) == len(x)
        total_TH = x.new_zeros(len(in_rank_TR), x.shape[1])
        total_TS = weights_MS.new_zeros(len(in_rank_TR), weights_MS.shape[1])
        sent = _gather(self.group, (x.detach(), weights_MS, received_R.tolist()))
        for there, (y_MH, w_MS, received) in enumerate(sent):
            total_TH[in_rank_TR[:, there]] += y_MH.split(received)[self.group.rank()]
            total_TS[in_rank_TR[:, there]] += w_MS.split(received)[self.group.rank()]
        return total_TH, None if topk_weights is None else total_TS, event


class HybridEPBuffer:
    """Dispatch with permutation and combine with unpermutation."""

    dispatched: list[DispatchedMap] = []  # noqa: RUF012 - one list for the process

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
    ) -> None:
        del num_sms_dispatch_api, num_sms_combine_api, num_sms_preprocessing_api
        del num_blocks_permute, num_blocks_unpermute
        assert not use_fp8
        assert hidden_dim % 16 == 0
        assert max_num_of_tokens_per_rank > 0
        assert num_local_experts * group.size() % 4 == 0
        self.group = group

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        num_of_experts_per_rank: int | None = None,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        scaling_factor: torch.Tensor | None = None,
        num_permuted_tokens: int | torch.Tensor | None = None,
        pad_multiple: int | None = None,
        handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:
        """Rows of this rank's experts, by expert; with a handle, those of an earlier call."""
        _check_tokens(hidden)
        assert scaling_factor is None  # fp8 tokens
        assert non_blocking == (handle is None and num_permuted_tokens is not None)
        if handle is None:
            assert num_of_experts_per_rank is not None
            assert routing_map is not None
            assert probs is not None
            assert routing_map.dtype == torch.bool
            assert probs.dtype == torch.float32
            assert routing_map.is_contiguous()
            assert probs.is_contiguous()
            assert routing_map.shape == probs.shape
            assert routing_map.shape == (len(hidden), num_of_experts_per_rank * self.group.size())
            HybridEPBuffer.dispatched.append(
                DispatchedMap(
                    routing_map.clone(), probs.detach().clone(), pad_multiple, fuse_permute_dispatch
                )
            )
            maps = _gather(self.group, routing_map)
            assert len({len(part) for part in maps}) == 1, "ranks must hold equally many tokens"
            handle = (torch.stack(maps), torch.zeros(1, dtype=torch.int32))
            probs = probs.detach()
        else:
            assert probs is None
        maps_RTN, _overflow = handle
        local = maps_RTN.shape[2] // self.group.size()
        rows = _rows(maps_RTN, self.group.rank(), local, pad_multiple)
        # It drops what is beyond a given size, and leaves what is short of it as it was in memory.
        assert num_permuted_tokens is None or int(num_permuted_tokens) == len(rows)
        sent = _gather(self.group, (hidden.detach(), probs))
        out_PH = hidden.new_zeros(len(rows), hidden.shape[1])
        probs_P = None if probs is None else probs.new_zeros(len(rows))
        for place, row in enumerate(rows):
            if row is not None:
                out_PH[place] = sent[row.rank][0][row.token]
                if probs_P is not None:
                    probs_P[place] = sent[row.rank][1][row.token, row.expert]
        first = local * self.group.rank()
        counts_L = maps_RTN[:, :, first : first + local].sum((0, 1))
        return out_PH, probs_P, None, _padded(counts_L, pad_multiple), handle

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: torch.Tensor | None = None,
        handle: tuple[Any, ...],
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send rows back and add them up; gates, one a row, go back to their expert's column."""
        del fuse_unpermute_combine
        _check_tokens(hidden)
        maps_RTN, _overflow = handle
        tokens, experts = maps_RTN.shape[1:]
        local = experts // self.group.size()
        assert len(hidden) == len(_rows(maps_RTN, self.group.rank(), local, pad_multiple))
        if probs is not None:
            assert probs.shape == (len(hidden),)
            assert probs.dtype == torch.float32
            assert probs.is_contiguous()
        total_TH = hidden.new_zeros(tokens, hidden.shape[1])
        total_TN = torch.zeros(tokens, experts)
        sent = _gather(self.group, (hidden.detach(), None if probs is None else probs.detach()))
        for there, (y_PH, w_P) in enumerate(sent):
            for place, row in enumerate(_rows(maps_RTN, there, local, pad_multiple)):
                if row is not None and row.rank == self.group.rank():
                    total_TH[row.token] += y_PH[place]
                    if w_P is not None:
                        total_TN[row.token, row.expert] = w_P[place]
        return total_TH, None if probs is None else total_TN


def _padded(counts: torch.Tensor, pad_multiple: int | None) -> torch.Tensor:
    multiple = pad_multiple or 1
    return (counts + multiple - 1) // multiple * multiple


def _rows(maps_RTN: torch.Tensor, rank: int, local: int, pad_multiple: int | None) -> list[_Row | None]:
    """What the rows that a rank receives are, in order; None is padding."""
    rows: list[_Row | None] = []
    for expert in range(local * rank, local * (rank + 1)):
        places = maps_RTN[:, :, expert].nonzero().tolist()
        rows += [_Row(source, token, expert) for source, token in places]
        rows += [None] * (int(_padded(torch.tensor(len(places)), pad_multiple)) - len(places))
    return rows


def install() -> None:
    """Be `deep_ep` for every import from now on."""
    assert "megatron.core" not in sys.modules
    module, utils = types.ModuleType("deep_ep"), types.ModuleType("deep_ep.utils")
    vars(module).update(Buffer=Buffer, HybridEPBuffer=HybridEPBuffer, utils=utils)
    vars(utils).update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    sys.modules.update({"deep_ep": module, "deep_ep.utils": utils})

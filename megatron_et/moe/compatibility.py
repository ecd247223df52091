"""Which settings of Megatron go together with Expert Threshold routing, and why the others do not (invariant
I8).

The rules read attributes that Megatron's parsed arguments and its TransformerConfig share, so that stock
scripts are checked at start-up and API users when a router is built.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megatron_et.config import ConfigError, ExpertThresholdConfig
from megatron_et.moe import cuda_graphs
from megatron_et.moe.settings import expert_shards, fanout_bound, uses_deepep


@dataclass(frozen=True)
class Needed:
    """A Megatron setting that ET needs: set when the user left it at Megatron's default, refused when it is
    something else."""

    name: str
    value: Any
    default: Any
    """Megatron's default, which stands for `left alone`."""
    why: str


NEEDED = (
    Needed(
        "moe_router_score_function",
        "sigmoid",
        "softmax",
        "the gate of a token is sigmoid(logit), independent of its other experts",
    ),
    Needed(
        "moe_router_dtype", "fp32", None, "in bf16 many logits tie at the threshold and expert loads jump"
    ),
    Needed(
        "moe_router_load_balancing_type",
        "none",
        "aux_loss",
        "thresholds balance the load, an auxiliary loss would fight them",
    ),
)


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot be combined with ET: `broken(settings)` is truthy when it is present."""

    flag: str
    broken: Callable[[Any], Any]
    why: str
    instead: str

    def sentence(self) -> str:
        """What the user is told."""
        return (
            f"{self.flag} cannot be combined with Expert Threshold routing: {self.why}. "
            f"Remedy: {self.instead}."
        )


def _get(name: str, default: Any = None) -> Callable[[Any], Any]:
    return lambda settings: getattr(settings, name, default)


def _total(coefficients: float | Collection[float] | None) -> float:
    return sum(coefficients) if isinstance(coefficients, Collection) else coefficients or 0.0


def _weight_shards(settings: Any) -> bool:
    # More shards than tensor-parallel ranks means that data-parallel ranks hold parts of one weight.
    ranks = getattr(settings, "tensor_model_parallel_size", None) or 1
    expert_ranks = getattr(settings, "expert_tensor_parallel_size", None) or ranks
    return (
        (getattr(settings, "tensor_parallel_num_weight_shards", None) or 1) > ranks
        or (getattr(settings, "expert_tensor_parallel_num_weight_shards", None) or 1) > expert_ranks
        or getattr(settings, "gtp_weight_remat_size", 1) > 1
        or getattr(settings, "expert_gtp_weight_remat_size", 1) > 1
    )


def _capacity_above_tokens(settings: Any) -> bool:
    num_experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    factor = getattr(settings, "moe_expert_capacity_factor", None)
    if (
        num_experts is None
        or factor is None
        or not getattr(settings, "moe_pad_expert_input_to_capacity", False)
    ):
        return False
    return factor * settings.moe_router_topk > num_experts


def pads_map(settings: Any) -> bool:
    """Whether Megatron pads the routing map, by either spelling of the flag."""
    return getattr(settings, "moe_router_padding_for_quantization", False) or getattr(
        settings, "moe_router_padding_for_fp8", False
    )


REFUSALS = (
    Refusal(
        "--moe-aux-loss-coeff",
        lambda s: _total(getattr(s, "moe_aux_loss_coeff", 0.0)) != 0.0,
        "thresholds balance the load, an auxiliary loss would fight them",
        "leave it out or set it to 0",
    ),
    Refusal(
        "--moe-router-enable-expert-bias",
        _get("moe_router_enable_expert_bias"),
        "loss-free balancing adds a second controller of the load beside the thresholds",
        "leave it out",
    ),
    Refusal(
        "--moe-router-num-groups / --moe-router-group-topk",
        lambda s: getattr(s, "moe_router_num_groups", None) or getattr(s, "moe_router_group_topk", None),
        "group-limited routing picks a top-k among groups, and thresholds pick no top-k",
        "leave them out",
    ),
    Refusal(
        "--moe-router-topk-scaling-factor",
        _get("moe_router_topk_scaling_factor"),
        "it corrects normalised top-k gates, and ET's gates are not normalised",
        "leave it out",
    ),
    Refusal(
        "--moe-router-pre-softmax", _get("moe_router_pre_softmax"), "the gate is a sigmoid", "leave it out"
    ),
    Refusal(
        "--moe-router-fusion",
        _get("moe_router_fusion"),
        "Transformer Engine's fused router computes a top-k",
        "leave it out",
    ),
    Refusal(
        "--moe-enable-routing-replay",
        _get("moe_enable_routing_replay"),
        "it records exactly top-k experts for each token, ET has any number",
        "leave it out",
    ),
    Refusal(
        "--moe-apply-probs-on-input",
        _get("moe_apply_probs_on_input"),
        "it is correct only for one expert a token, ET has any number",
        "leave it out",
    ),
    Refusal(
        "--moe-pad-expert-input-to-capacity with such a capacity",
        _capacity_above_tokens,
        "it is above the number of tokens, and a rank cannot fill an expert with more tokens than it has",
        "lower --moe-expert-capacity-factor to --num-experts / --moe-router-topk or less",
    ),
    Refusal(
        "--moe-router-padding-for-quantization with --moe-pad-expert-input-to-capacity",
        lambda s: pads_map(s) and getattr(s, "moe_pad_expert_input_to_capacity", False),
        "the dispatcher sends `capacity` tokens of each expert, and padding would displace real ones",
        "leave --moe-router-padding-for-quantization out: the experts pad their own input",
    ),
    Refusal(
        "--moe-router-padding-for-quantization with DeepEP",
        lambda s: pads_map(s) and uses_deepep(s),
        "where a rank receives too few tokens to pad the map, Megatron's DeepEP path leaves the padding to "
        "the experts, and they leave it to the map",
        "leave it out: the experts pad their own input",
    ),
    Refusal(
        "--fp4-format",
        _get("fp4"),
        "experts in NVFP4 have not been run with loads that vary (it takes a Blackwell GPU), and Transformer "
        "Engine 2.9 pads their tokens to 16 rows where NVFP4 needs 32",
        "use --fp8-format",
    ),
    Refusal(
        "--moe-pad-expert-input-to-capacity with HybridEP, and experts in shards or uneven inputs",
        lambda s: (
            getattr(s, "moe_pad_expert_input_to_capacity", False)
            and getattr(s, "moe_token_dispatcher_type", None) == "flex"
            and getattr(s, "moe_flex_dispatcher_backend", None) == "hybridep"
            and (expert_shards(s) > 1 or getattr(s, "moe_hybridep_pad_uneven_dispatch_inputs", False))
        ),
        "Megatron then gives HybridEP another capacity than the router's: rows are lost, or are not filled",
        "leave the capacity padding out, or use --expert-tensor-parallel-size 1 without "
        "--moe-hybridep-pad-uneven-dispatch-inputs",
    ),
    Refusal(
        "--moe-flex-dispatcher-backend ncclep",
        lambda s: getattr(s, "moe_flex_dispatcher_backend", None) == "ncclep",
        "NCCL-EP takes exactly top-k experts for each token and knows no empty slot",
        "use --moe-flex-dispatcher-backend hybridep or deepep",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda s: getattr(s, "transformer_impl", None) == "inference_optimized",
        "its router returns exactly top-k experts for each token",
        "use --transformer-impl transformer_engine or local",
    ),
    Refusal(
        "--cuda-graph-impl full_iteration",
        lambda s: cuda_graphs.implementation(s) == "full_iteration",
        "the graph would hold the token dispatcher, which waits for the number of tokens of each expert",
        "use --cuda-graph-impl transformer_engine with scopes of attn, mlp, mamba and moe_router",
    ),
    Refusal(
        "--cuda-graph-impl local",
        lambda s: cuda_graphs.implementation(s) == "local" and cuda_graphs.local_holds_moe(s),
        "its graphs hold a whole GPT layer or the token dispatcher, which waits for the number of tokens of "
        "each expert; only in a hybrid model without multi-token prediction do its scopes attn, mlp and "
        "mamba hold no MoE layer",
        "use --cuda-graph-impl transformer_engine with scopes of attn, mlp, mamba and moe_router",
    ),
    Refusal(
        "--cuda-graph-modules / --cuda-graph-scope without a value",
        lambda s: cuda_graphs.implementation(s) == "transformer_engine" and not cuda_graphs.scopes(s),
        "the graph of a whole layer would hold the token dispatcher, which waits for the number of tokens of "
        "each expert",
        "name what to capture: attn, mlp, mamba and moe_router",
    ),
    Refusal(
        "--cuda-graph-modules / --cuda-graph-scope with moe or moe_preprocess",
        lambda s: (
            cuda_graphs.implementation(s) == "transformer_engine"
            and cuda_graphs.scopes(s) - cuda_graphs.OUTSIDE_MOE - {cuda_graphs.ROUTER}
        ),
        "the graph would hold the token dispatcher, which waits for the number of tokens of each expert, or, "
        "with padding to a capacity and with HybridEP, has not been checked inside a graph",
        "use moe_router alone, which captures all that comes before the dispatcher",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm with --moe-token-dispatcher-type flex",
        lambda s: (
            getattr(s, "overlap_moe_expert_parallel_comm", False)
            and getattr(s, "moe_token_dispatcher_type", None) == "flex"
        ),
        "DeepEP and HybridEP have not been checked in a MoE layer that is split over two micro-batches",
        "use --moe-token-dispatcher-type alltoall, or leave the overlap out",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm with a CUDA graph of moe_router",
        lambda s: getattr(s, "overlap_moe_expert_parallel_comm", False) and cuda_graphs.captures_router(s),
        "the router in a graph has not been checked in a MoE layer that is split over two micro-batches",
        "leave one of them out",
    ),
    Refusal(
        "--overlap-dispatch-backward-with-experts-wgrad",
        _get("overlap_dispatch_backward_with_experts_wgrad"),
        "it delays the experts' weight gradients past the dispatcher's backward pass, which has not been "
        "checked with experts that have no tokens",
        "leave it out",
    ),
    Refusal(
        "--use-transformer-engine-op-fuser",
        _get("use_transformer_engine_op_fuser"),
        "the experts then run through Transformer Engine's fused operations, which have not been run with "
        "loads that vary or with experts that have no tokens",
        "leave it out",
    ),
    Refusal(
        "--batch-invariant-mode",
        # Older versions have the mode, but not for MoE layers; what they lack tells them apart.
        lambda s: getattr(s, "batch_invariant_mode", False) and hasattr(s, "batch_invariant_backend"),
        "its way back from the experts has exactly top-k slots for each token",
        "leave it out",
    ),
    Refusal(
        "--moe-expert-rank-capacity-factor",
        _get("moe_expert_rank_capacity_factor"),
        "HybridEP then drops what a rank receives beyond tokens * top-k * factor, and under ET the load of a "
        "rank is not known beforehand",
        "leave it out: HybridEP sizes its buffers by the routing map and drops nothing",
    ),
    Refusal(
        "--use-megatron-fsdp / --use-torch-fsdp2",
        lambda s: getattr(s, "use_megatron_fsdp", False) or getattr(s, "use_torch_fsdp2", False),
        "the thresholds' buffers have not been checked under FSDP",
        "use DDP with --use-distributed-optimizer",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards / --expert-tensor-parallel-num-weight-shards",
        _weight_shards,
        "the ranks that share a weight's shards hold tokens that the thresholds' statistics would miss",
        "leave them out",
    ),
    Refusal(
        "--moe-use-upcycling",
        _get("moe_use_upcycling"),
        "an upcycled state dict holds no thresholds",
        "upcycle with --moe-router-type topk, save, and start Expert Threshold routing from that checkpoint",
    ),
    Refusal(
        "--moe-routing-trace-path",
        _get("moe_routing_trace_path"),
        "Megatron's router trace records exactly top-k experts for each token",
        "use --moe-et-trace-dir",
    ),
)


POOL_IN_GRAPH = Refusal(
    "--moe-et-pool global with a CUDA graph of moe_router",
    cuda_graphs.captures_router,
    "its all-reduces have not been checked inside a graph",
    "use --moe-et-pool microbatch, or leave moe_router out",
)
"""For the pool that only our own settings name."""


def violations(settings: Any) -> list[str]:
    """Sentences, one for each setting that ET refuses; empty when all is well."""
    found = [rule.sentence() for rule in REFUSALS if rule.broken(settings)]
    num_experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    topk = getattr(settings, "moe_router_topk", None)
    if num_experts is None:
        found.append("--moe-router-type other than topk needs a MoE model: give --num-experts.")
    elif topk is not None and not 1 <= topk <= num_experts:
        found.append(
            f"--moe-router-topk is {topk}: as the target mean fan-out it must lie between 1 and "
            f"--num-experts {num_experts}."
        )
    return found


def _unmet(settings: Any, explicit: Collection[str]) -> tuple[list[Needed], list[str]]:
    """Needed settings that the user left alone, and sentences about those that were given another value."""
    left_alone, refused = [], []
    for need in NEEDED:
        value = getattr(settings, need.name, need.default)
        plain = value[0] if isinstance(value, list) and len(value) == 1 else value
        if plain == need.value:
            continue
        if plain == need.default and need.name not in explicit:
            left_alone.append(need)
            continue
        flag = "--" + need.name.replace("_", "-")
        refused.append(
            f"{flag} is {plain!r}, Expert Threshold routing needs {need.value!r}: {need.why}. "
            f"Remedy: leave {flag} out."
        )
    return left_alone, refused


def check(settings: Any, et: ExpertThresholdConfig, explicit: Collection[str] = ()) -> list[str]:
    """Check everything, and set what ET needs and the user left alone.

    Args:
        settings: Megatron's arguments or TransformerConfig; changed in place, but only when nothing is
            refused.
        et: our settings.
        explicit: attribute names that the user gave on the command line, even if at Megatron's default.

    Returns:
        a short text `name=value` for each setting that was changed, and for the bound on the fan-out that
        DeepEP needs (fanout.bounded puts it in force).

    Raises:
        ConfigError: lists every refused setting at once.
    """
    left_alone, refused = _unmet(settings, explicit)
    problems = violations(settings) + refused
    num_experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    topk = getattr(settings, "moe_router_topk", None)
    if et.max_fanout is not None and topk is not None and et.max_fanout < topk:
        problems.append(
            f"--moe-et-max-fanout is {et.max_fanout}, below the target mean fan-out --moe-router-topk "
            f"{topk}: "
            "no threshold can reach that target."
        )
    if et.max_fanout is not None and num_experts is not None and et.max_fanout > num_experts:
        problems.append(
            f"--moe-et-max-fanout is {et.max_fanout}, above --num-experts {num_experts}: leave it out."
        )
    bound = fanout_bound(settings)
    if bound is not None and et.max_fanout is not None and et.max_fanout > bound.most:
        problems.append(
            f"--moe-et-max-fanout is {et.max_fanout}, above {bound.most}: {bound.why}. "
            f"Remedy: leave it out, or --moe-flex-dispatcher-backend hybridep."
        )
    if bound is not None and topk is not None and topk > bound.most:
        problems.append(
            f"--moe-router-topk is {topk}: no token may get more than {bound.most} experts, as {bound.why}. "
            "Remedy: --moe-flex-dispatcher-backend hybridep."
        )
    if et.pool == "global" and POOL_IN_GRAPH.broken(settings):
        problems.append(POOL_IN_GRAPH.sentence())
    if problems:
        raise ConfigError("\n".join(problems))
    for need in left_alone:
        setattr(settings, need.name, need.value)
    changed = [f"{need.name}={need.value}" for need in left_alone]
    if bound is not None and et.max_fanout is None:
        # A token's number of experts varies around the target: a bound this near cuts many tokens short.
        near = topk is not None and bound.most < 2 * topk
        bites = f"; less than twice --moe-router-topk {topk}: watch moe/fanout_max" if near else ""
        changed.append(f"moe_et_max_fanout={bound.most} ({bound.why}{bites})")
    return changed

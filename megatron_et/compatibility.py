"""Which settings of Megatron go together with Expert Threshold routing, and why the others do not (invariant
I8).

The rules read attributes that Megatron's parsed arguments and its TransformerConfig share, so that stock
scripts are checked at start-up and API users when a router is built.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megatron_et.config import ConfigError, ExpertThresholdConfig


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
        "--moe-expert-capacity-factor",
        lambda s: getattr(s, "moe_expert_capacity_factor", None) not in (None, -1.0),
        "Megatron's capacity drops tokens of a fixed top-k",
        "use --moe-et-capacity-factor",
    ),
    Refusal(
        "--moe-pad-expert-input-to-capacity",
        _get("moe_pad_expert_input_to_capacity"),
        "expert loads vary under ET",
        "leave it out; --moe-et-capacity-factor bounds the load",
    ),
    Refusal(
        "--moe-pad-experts-for-cuda-graph-inference",
        _get("moe_pad_experts_for_cuda_graph_inference"),
        "it drops and pads to a capacity of a fixed top-k while decoding",
        "leave it out",
    ),
    Refusal(
        "--moe-router-padding-for-quantization",
        lambda s: (
            getattr(s, "moe_router_padding_for_quantization", False)
            or getattr(s, "moe_router_padding_for_fp8", False)
        ),
        "it adds unselected tokens to the routing map",
        "leave it out: the experts pad their own input",
    ),
    Refusal(
        "--moe-token-dispatcher-type flex",
        lambda s: (
            getattr(s, "moe_token_dispatcher_type", None) == "flex" or getattr(s, "moe_enable_deepep", False)
        ),
        "the flex dispatchers (DeepEP, HybridEP, NCCL-EP) have not been adapted to a varying fan-out yet",
        "use --moe-token-dispatcher-type alltoall or allgather",
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        lambda s: getattr(s, "transformer_impl", None) == "inference_optimized",
        "its router returns exactly top-k experts for each token",
        "use --transformer-impl transformer_engine or local",
    ),
    Refusal(
        "--cuda-graph-impl",
        # The second and third are old spellings, which Megatron turns into the first after this check.
        lambda s: (
            getattr(s, "cuda_graph_impl", None) not in (None, "none")
            or getattr(s, "enable_cuda_graph", False)
            or getattr(s, "external_cuda_graph", False)
        ),
        "a captured graph would freeze the routing of the phase in which it was captured (warm-up or "
        "thresholds)",
        "leave it out",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        _get("overlap_moe_expert_parallel_comm"),
        "splitting a MoE layer over two micro-batches has not been checked with a varying fan-out",
        "leave it out",
    ),
    Refusal(
        "--moe-expert-rank-capacity-factor",
        _get("moe_expert_rank_capacity_factor"),
        "it sizes buffers for a fixed top-k",
        "use --moe-et-capacity-factor",
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


def violations(settings: Any) -> list[str]:
    """Sentences, one for each setting that ET refuses; empty when all is well."""
    found = [
        f"{rule.flag} cannot be combined with Expert Threshold routing: {rule.why}. Remedy: {rule.instead}."
        for rule in REFUSALS
        if rule.broken(settings)
    ]
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
        a short text `name=value` for each setting that was changed.

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
    if problems:
        raise ConfigError("\n".join(problems))
    for need in left_alone:
        setattr(settings, need.name, need.value)
    return [f"{need.name}={need.value}" for need in left_alone]

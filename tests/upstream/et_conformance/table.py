"""Which of Megatron's MoE unit tests apply to Expert Threshold routing, how, and why the others do not.

A test is named `file::Class::test[parameters]`, the file relative to tests/unit_tests/transformer/moe of a
checkout. The first row whose pattern matches decides; `*` stands for anything.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_et.moe.compatibility import REFUSALS

Way = Literal["unadapted", "adapted", "plain"]
"""unadapted: the test as it is, top-k routing, with our dispatchers in place of Megatron's.
adapted: the test's code as it is, but every TransformerConfig asks for Expert Threshold routing (adapt.py):
router and dispatchers are ours.
plain: the control, on Megatron without the plug-in."""

WAYS: tuple[Way, ...] = ("unadapted", "adapted")


def matches(pattern: str, test: str) -> bool:
    """Whether a test's name matches; `*` stands for anything, all else for itself."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test) is not None


@dataclass(frozen=True)
class Row:
    """What is done with the tests that a pattern matches: some ways to run them, or a reason not to.

    Raises:
        ValueError: both ways and a reason.
    """

    pattern: str
    ways: tuple[Way, ...] = ()
    reason: str = ""
    """Why the tests do not apply. Without ways and reason they are unclassified."""
    adapters: tuple[str, ...] = ()
    """What else `adapted` changes: names in adapt.ADAPTERS."""
    needs: tuple[str, ...] = ()
    """What the tests need and do not ask for themselves: names in plugin.NEEDS."""

    def __post_init__(self) -> None:
        if self.ways and self.reason:
            raise ValueError(f"{self.pattern}: give either ways to run it or a reason why it does not apply")

    @property
    def classified(self) -> bool:
        """Whether somebody has said what is to be done."""
        return bool(self.ways or self.reason)

    def matches(self, test: str) -> bool:
        """Whether the row speaks of this test."""
        return matches(self.pattern, test)


def refusal(flag: str) -> str:
    """Why ET refuses a flag, as its user is told; empty when it does not."""
    whys = [rule.why for rule in REFUSALS if flag in rule.flag.split(" / ")]
    return f"{flag} is refused: {whys[0]}" if whys else ""


def both(pattern: str, *adapters: str, needs: tuple[str, ...] = (), flag: str = "") -> Row:
    """Run as it is with our dispatchers, and once more with our router unless ET refuses the flag."""
    ways = ("unadapted",) if flag and refusal(flag) else WAYS
    return Row(pattern, ways, adapters=adapters, needs=needs)


def router(pattern: str, *adapters: str, flag: str = "") -> Row:
    """Run with our router only, as the test reaches no dispatcher; does not apply if ET refuses the flag."""
    why = refusal(flag) if flag else ""
    return no(pattern, why) if why else Row(pattern, ("adapted",), adapters=adapters)


def no(pattern: str, reason: str) -> Row:
    """Does not apply."""
    return Row(pattern, reason=reason)


def refused(pattern: str, flag: str) -> Row:
    """Does not apply while ET refuses the flag that it tests; unclassified from then on."""
    return Row(pattern, reason=refusal(flag))


NOT_OURS = "reaches neither router nor dispatcher"
AUX = "tests auxiliary losses, with which Expert Threshold routing does not run: thresholds balance the load"
TE_FUSED = "tests Transformer Engine's fused experts on stand-ins, " + NOT_OURS
ALONE = "tests the experts alone, " + NOT_OURS
TE = ("transformer-engine",)
CAPACITY, PAD = "--moe-expert-capacity-factor", "--moe-pad-expert-input-to-capacity"
QUANTIZATION = "--moe-router-padding-for-quantization"

ROWS: tuple[Row, ...] = (
    # ---- dispatchers
    no("test_a2a_token_dispatcher.py::test_placeholder", "tests nothing"),
    both("test_a2a_token_dispatcher.py::*::test_forward_backward*", "gates-by-fanout"),
    both("test_a2a_token_dispatcher.py::*::test_capacity_forward_backward*", flag=CAPACITY),
    both("test_a2a_token_dispatcher.py::*::test_capacity_padding_forward_backward*", flag=PAD),
    both("test_a2a_token_dispatcher.py::*::test_router_padding_for_fp8*", flag=QUANTIZATION),
    both("test_token_dispatcher.py::TestAllgatherDispatcher::*", "gates-by-fanout"),
    refused("test_token_dispatcher.py::TestFlexDispatcher::*ncclep*", "--moe-flex-dispatcher-backend ncclep"),
    refused(
        "test_token_dispatcher.py::TestFlexDispatcher::test_forward_backward_zero_copy*",
        "--moe-flex-dispatcher-backend ncclep",
    ),
    refused(
        "test_token_dispatcher.py::TestFlexDispatcher::test_forward_backward_variant_parity*",
        "--moe-flex-dispatcher-backend ncclep",
    ),
    both("test_token_dispatcher.py::TestFlexDispatcher::test_forward_backward*", "gates-by-fanout"),
    both("test_token_dispatcher.py::TestFlexDispatcher::test_capacity_*", flag=CAPACITY),
    both("test_token_dispatcher.py::TestFlexDispatcher::test_router_padding_for_fp8*", flag=QUANTIZATION),
    no("test_token_dispatcher.py::test_hybridep_*", "tests HybridEP's manager, which is Megatron's"),
    # ---- router
    router("test_routers.py::TestTop2Router::test_constructor"),
    router("test_routers.py::TestTop2Router::test_router_forward[sigmoid-False]"),
    refused("test_routers.py::TestTop2Router::test_router_forward[*-True]", "--moe-router-pre-softmax"),
    no("test_routers.py::TestTop2Router::test_router_forward[softmax-*", "the gate is a sigmoid"),
    refused("test_routers.py::*::test_router_forward_fusion_equivalence*", "--moe-router-fusion"),
    no("test_routers.py::TestTop2Router::test_aux_loss", AUX),
    router("test_routers.py::TestTop2Router::test_router_with_padding_mask"),
    refused("test_routers.py::*::test_expert_bias*", "--moe-router-enable-expert-bias"),
    no(
        "test_routers.py::TestTop2Router::test_router_dtype",
        "wants bf16 and fp64 scores as well, and Expert Threshold routing runs in fp32 only",
    ),
    router("test_routers.py::TestTop2Router::test_force_load_balancing"),
    router("test_routers.py::TestTop2Router::test_token_dropping[*-None]", "warm-up"),
    router("test_routers.py::TestTop2Router::test_token_dropping[True-*", flag=PAD),
    router("test_routers.py::TestTop2Router::test_token_dropping*", flag=CAPACITY),
    refused("test_routers.py::TestGroupLimitedRouter::*", "--moe-router-num-groups"),
    refused("test_routers.py::TestAuxLossFreeTop2Router::*", "--moe-router-enable-expert-bias"),
    no("test_routers.py::test_router_gating_linear*", "tests the gate's product, which is Megatron's"),
    no("test_routers.py::test_topk_routing_*", "tests the top-k function, which is not called"),
    router("test_aux_loss.py::TestPaddingMaskAuxLoss::test_padding_mask_with_z_loss*", "router-class"),
    no("test_aux_loss.py::*", AUX),
    no("test_qb_routing.py::*", "tests Megatron's quantile-balancing router, another one"),
    refused("test_router_replay.py::*", "--moe-enable-routing-replay"),
    refused("test_router_trace.py::*", "--moe-routing-trace-path"),
    # ---- the layer
    both("test_moe_layer.py::TestMoELayerInit::*"),
    both("test_moe_layer.py::TestInterleaveTransformerBlock::*"),
    both("test_moe_layer.py::TestMoELayerFP16::*"),
    both("test_moe_layer.py::TestMoELayerRecompute::*"),
    both("test_moe_layer_discrepancy.py::*", needs=TE),
    both("test_latent_moe_layer.py::*"),
    both("test_sequential_mlp.py::TestParallelSequentialMLP::*"),
    no("test_sequential_mlp.py::TestTEParallelSequentialMLP::*", ALONE),
    both("test_shared_experts.py::TestSharedExperts::*"),
    both("test_shared_experts.py::TestSharedExpertsOverlap::*"),
    no("test_shared_experts.py::test_*", TE_FUSED),
    no("test_grouped_mlp.py::test_*", TE_FUSED),
    no("test_grouped_mlp.py::*::test_gpu_make_fused_ops_*", ALONE),
    no(
        "test_grouped_mlp.py::*::test_gpu_fused_path_scales_fc2_bias*", "tests the experts alone, " + NOT_OURS
    ),
    no("test_grouped_mlp.py::*::test_gpu_single_grouped_*", "tests how experts' weights are stored"),
    both("test_grouped_mlp.py::*"),
    both("test_grouped_tensor_dispatcher_numerics.py::*::test_alltoall_*"),
    both("test_grouped_tensor_dispatcher_numerics.py::*::test_deepep_*"),
    both("test_grouped_tensor_dispatcher_numerics.py::*::test_hybridep_*"),
    refused("test_grouped_tensor_dispatcher_numerics.py::*", "--moe-flex-dispatcher-backend ncclep"),
    # ---- elsewhere
    no("test_multihot_indices_converter.py::*", "tests a conversion of the flex dispatcher's, " + NOT_OURS),
    no("test_moe_batch_invariant.py::*", "tests batch-invariant kernels of the experts, " + NOT_OURS),
    no("test_moe_recompute_memory.py::*", "tests the memory of a stand-in layer, " + NOT_OURS),
    no("test_moe_single_grouped_weight_numerics.py::*", "tests how experts' weights are stored"),
    refused("test_paged_stash*.py::*", "--moe-expert-rank-capacity-factor"),
    refused("test_upcycling.py::*", "--moe-use-upcycling"),
)


def find(test: str, rows: Sequence[Row] = ROWS) -> Row | None:
    """The row that speaks of a test, or None: a test of Megatron's that nobody has classified yet."""
    row = next((row for row in rows if row.matches(test)), None)
    return row if row is not None and row.classified else None

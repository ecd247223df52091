"""The parallel layout and the size of a Megatron training command, said before it starts.

    WORLD_SIZE=64 LOCAL_WORLD_SIZE=8 VOCAB_SIZE=32000 python examples/common/layout.py <the command's flags>

Reads the few flags that it needs, the last of each winning as in Megatron, and refuses what cannot fit
together with a sentence (exit status 2). Standard library only, no Megatron: it takes 50 ms, so every example
runs it at every start, before hundreds of GPUs have waited for one another.

Legend: H hidden size, L layers, A attention heads, G query groups, D channels of a head, E experts, V padded
vocabulary, TP / PP / CP / EP / ETP ranks that share a tensor / the layers / a sequence / the experts / an
expert's tensors, DP data-parallel replicas of the dense part, EDP those of the experts.
"""

import argparse
import ast
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

GIB = 2**30


class LayoutError(ValueError):
    """Sizes that do not fit together; says which, and what to change."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LayoutError(message)


def parse(words: Sequence[str], vocabulary: int | None = None) -> argparse.Namespace:
    """The flags that matter here; all others are passed over.

    Args:
        words: the training command's flags.
        vocabulary: its size where no flag says it, because a tokenizer does.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    whole = (
        *("num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size"),
        *("global-batch-size",),
    )
    for name in whole:
        parser.add_argument(f"--{name}", type=int, required=True)
    ones = (
        *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
        *("expert-model-parallel-size", "num-virtual-stages-per-pipeline-rank", "moe-router-topk"),
    )
    for name in ones:
        parser.add_argument(f"--{name}", type=int, default=1)
    optional = (
        *("expert-tensor-parallel-size", "ffn-hidden-size", "moe-ffn-hidden-size", "num-query-groups"),
        *("kv-channels", "num-experts", "moe-shared-expert-intermediate-size", "q-lora-rank"),
        "mtp-num-layers",
    )
    for name in optional:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--vocab-size", type=int, default=vocabulary)
    # Megatron's defaults of multi-head latent attention.
    for name, default in (("kv-lora-rank", 32), ("qk-head-dim", 128), ("qk-pos-emb-head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--v-head-dim", type=int, default=128)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--moe-router-load-balancing-type", default="aux_loss")
    parser.add_argument("--optimizer", default="adam")
    switches = (
        *("swiglu", "qk-layernorm", "untie-embeddings-and-output-weights", "multi-latent-attention"),
        *("sequence-parallel", "use-distributed-optimizer", "optimizer-cpu-offload", "bf16"),
        *("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"),
    )
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_known_args(list(words))[0]


# --- size ---


@dataclass(frozen=True)
class Parameters:
    """Parameters of the parts of a model, norms included."""

    embedding: int
    output: int
    attention: int
    """Of one layer, with both of its norms."""
    dense_mlp: int
    router: int
    expert: int
    shared: int
    """Shared expert, 0 without."""
    final_norm: int
    mtp: int
    """What a multi-token-prediction head has besides its transformer layer."""


def parameters(args: argparse.Namespace) -> Parameters:
    """Counted as Megatron builds the model, without biases (every example has --disable-bias-linear)."""
    hidden = args.hidden_size
    matrices = 3 if args.swiglu else 2
    ffn = args.ffn_hidden_size or 4 * hidden
    embedding = hidden * padded_vocabulary(args)
    return Parameters(
        embedding=embedding,
        output=embedding if args.untie_embeddings_and_output_weights else 0,
        attention=_attention(args) + 2 * hidden,
        dense_mlp=matrices * hidden * ffn,
        router=(args.num_experts or 0) * hidden,
        expert=matrices * hidden * (args.moe_ffn_hidden_size or ffn),
        shared=matrices * hidden * (args.moe_shared_expert_intermediate_size or 0),
        final_norm=hidden,
        mtp=3 * hidden + 2 * hidden * hidden,
    )


def padded_vocabulary(args: argparse.Namespace) -> int:
    """V: Megatron pads the vocabulary so that it can be split over TP ranks."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return math.ceil(args.vocab_size / multiple) * multiple


def _attention(args: argparse.Namespace) -> int:
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.multi_latent_attention:
        query_dim = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
        query = hidden * query_dim
        if args.q_lora_rank:
            query = hidden * args.q_lora_rank + args.q_lora_rank * query_dim
        key_value = hidden * (args.kv_lora_rank + args.qk_pos_emb_head_dim)
        key_value += args.kv_lora_rank * heads * (args.qk_head_dim + args.v_head_dim)
        norms = (args.q_lora_rank or 0) + args.kv_lora_rank if args.qk_layernorm else 0
        return query + key_value + norms + heads * args.v_head_dim * hidden
    channels = args.kv_channels or hidden // heads
    groups = args.num_query_groups or heads
    norms = 2 * channels if args.qk_layernorm else 0
    return hidden * channels * (heads + 2 * groups) + heads * channels * hidden + norms


def moe_layers(args: argparse.Namespace) -> list[bool]:
    """Which decoder layers are MoE layers, in order."""
    if not args.num_experts:
        return [False] * args.num_layers
    frequency = _frequency(args.moe_layer_freq)
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(args.num_layers)]
    if len(frequency) != args.num_layers:
        raise LayoutError(
            f"--moe-layer-freq {args.moe_layer_freq} names {len(frequency)} layers, --num-layers is "
            f"{args.num_layers}"
        )
    return [bool(moe) for moe in frequency]


def _frequency(text: str) -> int | list[int]:
    """An integer, or Megatron's list expression: sums of [0]*3 and [1,0]."""
    if text.isdigit():
        return int(text)
    frequency: list[int] = []
    for part in text.strip("()").split("+"):
        values, _, times = part.partition("*")
        frequency += ast.literal_eval(values) * int(times or 1)
    return frequency


def total_parameters(args: argparse.Namespace) -> int:
    """All parameters, multi-token-prediction heads included."""
    return _sum(args, experts=args.num_experts or 0)


def active_parameters(args: argparse.Namespace) -> int:
    """Those that one token meets on average: topk routed experts, the shared one, and both embeddings, but no
    multi-token-prediction head, which a trained model is served without."""
    return _sum(args, experts=args.moe_router_topk, heads=0)


def _sum(args: argparse.Namespace, experts: int, heads: int | None = None) -> int:
    part, layers = parameters(args), moe_layers(args)
    heads = (args.mtp_num_layers or 0) if heads is None else heads
    each = [_layer(part, moe, experts) for moe in layers]
    return part.embedding + part.output + part.final_norm + sum(each) + heads * (part.mtp + each[-1])


def _layer(part: Parameters, moe: bool, experts: int) -> int:
    mlp = part.router + part.shared + experts * part.expert if moe else part.dense_mlp
    return part.attention + mlp


# --- layout ---


@dataclass(frozen=True)
class Layout:
    """How a number of processes shares a model and a batch."""

    world: int
    dp: int
    edp: int
    accumulation: int
    """Micro-batches that a rank trains in each step."""
    tokens: int
    """Tokens of a micro-batch on one rank, in the MoE layers."""
    experts: int
    """Routed experts on one rank, in each MoE layer."""
    state: int
    """Bytes of weights, gradients and optimizer state on the GPU with most of them."""
    offloaded: int
    """Bytes of optimizer state in the host's memory, for the rank with most of them."""


def layout(args: argparse.Namespace, world: int) -> Layout:
    """The layout, or a LayoutError for the first thing that does not fit."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tp
    virtual = args.num_virtual_stages_per_pipeline_rank
    _divides(tp * pp * cp, world, f"TP {tp} x PP {pp} x CP {cp}", "the number of processes")
    _divides(etp * ep * pp, world, f"expert TP {etp} x EP {ep} x PP {pp}", "the number of processes")
    dp, edp = world // (tp * pp * cp), world // (etp * ep * pp)
    experts = args.num_experts or 0
    if experts:
        _divides(ep, experts, f"EP {ep}", "the number of experts")
    elif ep > 1:
        raise LayoutError(f"EP {ep} without experts")
    _divides(tp, args.num_attention_heads, f"TP {tp}", "the number of attention heads")
    micro, batch = args.micro_batch_size, args.global_batch_size
    _divides(micro * dp, batch, f"micro-batch size {micro} x DP {dp}", "the global batch size")
    accumulation = batch // (micro * dp)
    if virtual > 1:
        _divides(pp, accumulation, f"PP {pp} with virtual stages", "the micro-batches of a rank")
    if tp > 1 and experts and not args.sequence_parallel:
        raise LayoutError(f"TP {tp} with experts: Megatron trains it with --sequence-parallel only")
    shards = cp * (tp if args.sequence_parallel else 1)
    _divides(2 * cp if cp > 1 else 1, args.seq_length, f"2 x CP {cp}", "the sequence length")
    _divides(shards, args.seq_length, "TP x CP", "the sequence length")
    if args.moe_router_load_balancing_type == "quantile_balancing":
        pairs = micro * args.seq_length * args.moe_router_topk
        _divides(experts, pairs, f"quantile balancing: E {experts}", "tokens x topk of a micro-batch")
    state, offloaded = _bytes(args, dp * cp, edp)
    return Layout(
        world,
        dp,
        edp,
        accumulation,
        micro * args.seq_length // shards,
        experts // ep,
        state,
        offloaded,
    )


def _divides(divisor: int, number: int, divisor_is: str, number_is: str) -> None:
    if divisor < 1 or number % divisor or number < divisor:
        product = f" = {divisor}" if " x " in divisor_is else ""
        raise LayoutError(f"{divisor_is}{product} does not divide {number_is}, {number}")


def _stages(args: argparse.Namespace) -> list[list[int]]:
    """Decoder layers of each pipeline stage, virtual stages together."""
    pp, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    before = [-1] if args.account_for_embedding_in_pipeline_split else []
    after = [-1] if args.account_for_loss_in_pipeline_split else []
    places = [*before, *range(args.num_layers), *after]
    what = "layers (with embedding and loss, where they count as layers)"
    _divides(pp * virtual, len(places), f"PP {pp} x {virtual} virtual stages", what)
    size = len(places) // (pp * virtual)
    chunks = [places[i : i + size] for i in range(0, len(places), size)]
    # Virtual stages take turns: chunk i belongs to stage i mod PP.
    return [[n for chunk in chunks[stage::pp] for n in chunk if n >= 0] for stage in range(pp)]


def _bytes(args: argparse.Namespace, replicas: int, expert_replicas: int) -> tuple[int, int]:
    """Bytes on the GPU, and offloaded, of the fullest rank: bf16 weights, fp32 gradients, and the optimizer's
    copies in fp32 (Adam 3, Muon 2), which the distributed optimizer spreads over the replicas."""
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp, pp = args.expert_tensor_parallel_size or tp, args.pipeline_model_parallel_size
    part, layers = parameters(args), moe_layers(args)
    kept = (2 if args.bf16 else 4) + 4
    copies = 4 * ((3 if args.optimizer == "adam" else 2) - (not args.bf16))  # fp32 weights are their own copy
    spread = args.use_distributed_optimizer or args.optimizer == "dist_muon"
    most = (0, 0)
    for stage, numbers in enumerate(_stages(args)):
        dense = sum(_layer(part, layers[n], 0) for n in numbers)
        routed = sum(layers[n] for n in numbers)
        dense += part.embedding if stage == 0 else 0
        if stage == pp - 1:
            heads = args.mtp_num_layers or 0
            dense += part.output + part.final_norm + heads * (part.mtp + _layer(part, layers[-1], 0))
            routed += heads * layers[-1]
            # Tied weights, and the embedding that a prediction head needs, are copied to the last stage.
            copied = not args.untie_embeddings_and_output_weights or heads
            dense += part.embedding if pp > 1 and copied else 0
        expert = routed * (args.num_experts or 0) * part.expert / (ep * etp)
        weights = dense / tp + expert
        if spread:
            optimizer = copies * (dense / tp / replicas + expert / expert_replicas)
        else:
            optimizer = copies * weights
        offloaded = optimizer if args.optimizer_cpu_offload else 0
        most = max(most, (int(kept * weights + optimizer - offloaded), int(offloaded)))
    return most


def describe(args: argparse.Namespace, found: Layout, *, local: int, memory: int | None) -> list[str]:
    """The layout in sentences.

    Args:
        args: the flags.
        found: their layout.
        local: processes of one node.
        memory: GiB of one GPU's memory, None on CPU.
    """
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tp
    virtual = args.num_virtual_stages_per_pipeline_rank
    stages = f"PP {pp}" + (f" ({virtual} virtual stages each)" if virtual > 1 else "")
    lines = [
        f"{found.world} processes, {local} a node: TP {tp} x {stages} x CP {cp} x DP {found.dp}",
        f"experts: ETP {etp} x EP {ep} x PP {pp} x expert DP {found.edp}, {found.experts} of "
        f"{args.num_experts or 0} experts a rank and MoE layer",
        f"{found.tokens:,} tokens a rank and micro-batch, gradient accumulation {found.accumulation}, "
        f"{args.global_batch_size * args.seq_length:,} tokens a step",
        f"{_readable(total_parameters(args))} parameters, {_readable(active_parameters(args))} active for a "
        f"token (mean fan-out {args.moe_router_topk})",
    ]
    text = f"weights, gradients and optimizer state: {found.state / GIB:.1f} GiB on the fullest rank"
    text += f" of {memory} GiB" if memory else ""
    text += f", and {found.offloaded / GIB:.1f} GiB in host memory" if found.offloaded else ""
    return [*lines, f"{text}; activations come on top"]


def _readable(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def main() -> None:
    """Print the layout as comment lines of a shell script."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    memory = int(os.environ.get("GPU_MEMORY_GIB") or 0) or None
    try:
        args = parse(sys.argv[1:], vocabulary=int(os.environ["VOCAB_SIZE"]))
        found = layout(args, world)
        if memory and found.state > memory * GIB:
            raise LayoutError(
                f"weights, gradients and optimizer state take {found.state / GIB:.0f} GiB on a GPU of "
                f"{memory} GiB: more GPUs, other parallel sizes, or OFFLOAD=1 for the optimizer's state"
            )
    except LayoutError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    for line in describe(args, found, local=local, memory=memory):
        print(f"#   {line}")


if __name__ == "__main__":
    main()

"""Published MoE models as numbers: parameters, FLOPs of a token, and how they are laid out over GPUs.

Sizes are those of the models' published configurations; layouts, batches and TFLOP/s are published
H100 benchmarks (SOURCES). No shared expert is added to the models that have none.
"""

from dataclasses import dataclass, replace

SEQUENCE = 4096
GPUS = (64, 256, 1024, 4096, 16384)
SOURCES = """
- Model sizes: the models' config.json on Hugging Face (mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B,
  Qwen/Qwen3-235B-A22B, deepseek-ai/DeepSeek-V3); the multi-token-prediction layer of DeepSeek-V3 is left out.
- Mixtral-8x7B: TP1 PP4 EP8, 256 sequences (yanring/Megatron-MoE-ModelZoo, runtime.conf); 468 TFLOP/s bf16
  (README of Megatron-Core's MoE, 0.12).
- Qwen3-30B-A3B: 16 GPUs, EP16, 299 TFLOP/s bf16 with HybridEP and overlap (published by NVIDIA); 512
  sequences (Megatron-Bridge, performance summary).
- Qwen3-235B-A22B: TP2 PP8 EP32, 2,048 sequences, 320 TFLOP/s bf16 (Megatron-MoE-ModelZoo, best practice).
- DeepSeek-V3: TP2 PP8 EP64, 8,192 sequences, 338 TFLOP/s FP8 on 1,024 GPUs (Megatron-Bridge, performance
  summary 25.09).
- All four speeds were measured with forced balance.
"""


@dataclass(frozen=True)
class Attention:
    """Weights of one layer, and the widths of a head that count for the FLOPs of the scores."""

    parameters: int
    heads: int
    query_width: int
    value_width: int


def grouped(hidden: int, heads: int, groups: int, width: int, *, normalized: bool) -> Attention:
    """Grouped-query attention without biases; `normalized` adds RMSNorms of queries and keys."""
    weights = 2 * hidden * heads * width + 2 * hidden * groups * width + 2 * width * normalized
    return Attention(weights, heads, width, width)


def latent(hidden: int, heads: int, query: int, latents: int, plain: int, rope: int, value: int) -> Attention:
    """Multi-head latent attention."""
    queries = hidden * query + query * heads * (plain + rope) + query
    keys = hidden * (latents + rope) + latents * heads * (plain + value) + latents
    return Attention(queries + keys + heads * value * hidden, heads, plain + rope, value)


@dataclass(frozen=True)
class Layout:
    """How one replica is spread: tensor, pipeline and expert parallel sizes, and the global batch."""

    tp: int
    pp: int
    ep: int
    sequences: int
    """Of the published global batch."""


@dataclass(frozen=True)
class Shape:
    """One model."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    vocabulary: int
    attention: Attention
    dense_width: int
    experts: int
    topk: int
    expert_width: int
    shared_width: int
    layout: Layout
    tflops: float
    """Published model TFLOP/s per GPU on H100."""
    fp8: bool
    published: tuple[float, float]
    """Total and active parameters in billions, as the model's authors say."""

    @property
    def moe_layers(self) -> int:
        """Layers with a router."""
        return self.layers - self.dense_layers

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert: gate, up and down projection."""
        return 3 * self.hidden * self.expert_width

    def parameters(self, experts: int | None = None) -> int:
        """All of them, or with this many routed experts in each layer."""
        routed = self.experts if experts is None else experts
        moe = routed * self.expert_parameters + 3 * self.hidden * self.shared_width
        moe += self.hidden * self.experts
        each = self.attention.parameters + 2 * self.hidden
        dense = self.dense_layers * 3 * self.hidden * self.dense_width
        return (
            self.layers * each
            + self.moe_layers * moe
            + dense
            + 2 * self.vocabulary * self.hidden
            + self.hidden
        )

    @property
    def active(self) -> int:
        """Parameters that a token meets on average."""
        return self.parameters(self.topk)

    def flops(self, sequence: int = SEQUENCE) -> float:
        """Of one token, forward and backward: 6 per weight it is multiplied with, and causal scores."""
        scores = 3 * sequence * self.attention.heads
        scores *= self.attention.query_width + self.attention.value_width
        return 6.0 * (self.active - self.vocabulary * self.hidden) + self.layers * scores

    @property
    def expert_flops(self) -> float:
        """Of one token in routed experts, forward and backward."""
        return 6.0 * self.moe_layers * self.topk * self.expert_parameters


@dataclass(frozen=True)
class Placement:
    """A shape on a number of GPUs."""

    shape: Shape
    gpus: int
    layout: Layout

    @property
    def stage_routers(self) -> int:
        """Routers on a rank of the fullest pipeline stage."""
        return -(-self.shape.moe_layers // self.layout.pp)

    @property
    def statistics_ranks(self) -> int:
        """Ranks of the tp_dp_cp group, which reduces the statistics of a stage."""
        return self.gpus // self.layout.pp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one sequence that a pipeline runs through in a step."""
        return self.layout.sequences * self.layout.tp * self.layout.pp // self.gpus

    @property
    def rank_tokens(self) -> int:
        """Tokens of a rank's micro-batch: a sequence is shared by its tensor-parallel ranks."""
        return SEQUENCE // self.layout.tp

    @property
    def step_seconds(self) -> float:
        """At the published TFLOP/s, whatever the number of GPUs."""
        tokens = self.layout.sequences * SEQUENCE
        return tokens * self.shape.flops() / (self.gpus * self.shape.tflops * 1e12)

    @property
    def static_bytes(self) -> float:
        """Per GPU: bf16 weights, fp32 gradients, and 12 bytes of optimizer over all ranks that share them."""
        shape, layout = self.shape, self.layout
        routed = shape.moe_layers * shape.experts * shape.expert_parameters
        held = routed / (layout.pp * layout.ep) + (shape.parameters() - routed) / (layout.pp * layout.tp)
        return 6.0 * held + 12.0 * shape.parameters() / self.gpus


def place(shape: Shape, gpus: int) -> Placement:
    """The published layout on this many GPUs.

    Fewer GPUs than it needs: fewer pipeline stages. More: a larger global batch where needed, so that every
    pipeline has at least as many micro-batches as stages.
    """
    layout = shape.layout
    layout = replace(layout, ep=min(layout.ep, gpus))
    layout = replace(layout, pp=min(layout.pp, gpus // layout.ep))
    return Placement(shape, gpus, replace(layout, sequences=max(layout.sequences, gpus // layout.tp)))


SHAPES = (
    Shape(
        "Mixtral-8x7B", 32, 0, 4096, 32000, grouped(4096, 32, 8, 128, normalized=False), 0,
        8, 2, 14336, 0, Layout(1, 4, 8, 256), 468.0, False, (46.7, 12.9),
    ),
    Shape(
        "Qwen3-30B-A3B", 48, 0, 2048, 151936, grouped(2048, 32, 4, 128, normalized=True), 0,
        128, 8, 768, 0, Layout(1, 1, 16, 512), 299.0, False, (30.5, 3.3),
    ),
    Shape(
        "Qwen3-235B-A22B", 94, 0, 4096, 151936, grouped(4096, 64, 4, 128, normalized=True), 0,
        128, 8, 1536, 0, Layout(2, 8, 32, 2048), 320.0, False, (235.0, 22.0),
    ),
    Shape(
        "DeepSeek-V3", 61, 3, 7168, 129280, latent(7168, 128, 1536, 512, 128, 64, 128), 18432,
        256, 8, 2048, 2048, Layout(2, 8, 64, 8192), 338.0, True, (671.0, 37.0),
    ),
)  # fmt: skip

"""Compiles the kernels to machine code for GPUs that need not be there: `python -m tests.kernels.compiled`.

What the interpreter cannot see: types, layouts and instructions that a GPU has not.
"""

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_et.rule.kernels import count, native, nvrtc, route, select
from megatron_et.rule.kernels.routed import EXPERTS_COUNTED, TOKENS_COUNTED, tile
from megatron_et.rule.quantile import Histogram

GPUS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
POINTERS = {
    "padding": "*u8", "routing_map": "*i1", "fanout": "*i32", "counts": "*i64", "histogram": "*i64",
    "num_tokens": "i32", "num_experts": "i32", "stride_t": "i32", "stride_e": "i32", "max_fanout": "i32",
}  # fmt: skip


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, gpu: str) -> None:
    """Compile one kernel; raises what Triton or ptxas raises."""
    own = dict.fromkeys(("logits", "gates", "grad_gates", "grad_logits"), f"*{dtype}")
    signature = {
        name: "constexpr" if name in constants else (own | POINTERS).get(name, "*fp32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", GPUS[gpu], 32))
    print(
        f"compiled {gpu} {kernel.__name__} {dtype} {len(compiled.asm['cubin'])} bytes {constants}", flush=True
    )


def main() -> None:
    """All GPUs with a common setting, and an H100 with all."""
    plain = {"BOUNDED": False, "PADDED": False, "LIMITED": False, "NORMALIZED": False, "COUNTED": True}
    none = {"lower": None, "upper": None, "padding": None}
    full = {"BOUNDED": True, "PADDED": True, "LIMITED": True, "NORMALIZED": True, "COUNTED": True}
    uncounted = {**plain, **none, "COUNTED": False, "counts": None}
    cases = [(gpu, 128, {**plain, **none}, "fp32") for gpu in GPUS]
    cases += [("sm_90", experts, full, "fp32") for experts in (1, 8, 256, 2304)]
    cases += [("sm_90", 64, uncounted, "fp32"), ("sm_90", 64, full, "bf16")]
    for gpu, experts, constants, dtype in cases:
        blocks = dict(zip(("BLOCK_T", "BLOCK_E"), tile(experts), strict=True))
        compile_kernel(route.forward, {**constants, **blocks, "BLOCKS": 2}, dtype, gpu)
        normalized = {"NORMALIZED": constants["NORMALIZED"]}
        compile_kernel(route.backward, {**normalized, **blocks}, dtype, gpu)
    histogram = Histogram(8)
    bins = {"BINS": histogram.bins, "FIRST": histogram.bits_of_first_octave}
    for gpu, dtype in (("sm_80", "fp32"), ("sm_90", "fp32"), ("sm_100", "fp32"), ("sm_90", "bf16")):
        stripe = {"EXPERTS": EXPERTS_COUNTED, "BLOCK_T": TOKENS_COUNTED}
        compile_kernel(count.count, {**bins, **stripe}, dtype, gpu)
    for gpu, kernel in itertools.product(
        GPUS, (native.kernel(histogram), native.kernel(None), select.kernel())
    ):
        code = nvrtc.compiled(gpu, kernel)
        print(f"compiled {gpu} {kernel.file} {len(code)} bytes {kernel.constants}", flush=True)


if __name__ == "__main__":
    main()

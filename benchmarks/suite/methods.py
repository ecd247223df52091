"""The routers that are compared, each configured as its authors recommend.

`config` are fields of Megatron's TransformerConfig; the flags of a training run are made from them, so that a
method is the same thing at every level.
"""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to route."""

    name: str
    config: dict[str, Any]
    source: str
    """Where its settings come from."""
    et: dict[str, Any] | None = None
    """Settings of ExpertThresholdConfig; None for Megatron's own routers."""
    needs: tuple[str, ...] = field(default=())
    """What must be there: transformer_engine, gpu."""

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if "transformer_engine" in self.needs and importlib.util.find_spec("transformer_engine") is None:
            return "Transformer Engine is not installed"
        if "gpu" in self.needs and device != "cuda":
            return "no GPU"
        if self.config.get("moe_router_load_balancing_type") == "quantile_balancing" and not _has_quantile():
            return "this Megatron-Core has no quantile balancing"
        return None

    def flags(self) -> list[str]:
        """The same as flags of a training run; thresholds settle in a short warm-up."""
        settings = dict(self.config)
        if self.et is not None:
            settings |= {"moe_router_type": self.et["router_type"]}
            settings |= {f"moe_et_{name}": v for name, v in self.et.items() if name != "router_type"}
        words: list[str] = []
        for name, value in settings.items():
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(value)]
        return words


def _has_quantile() -> bool:
    from megatron.core.transformer.moe import router

    return hasattr(router.TopKRouter, "quantile_balancing")


def _topk(balancing: str, **config: Any) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": balancing, "moe_router_dtype": "fp32"} | config


def _et(router_type: str, **et: Any) -> dict[str, Any]:
    return {"router_type": router_type, "ema_decay": 0.9, "warmup_steps": 20, "kernels": "torch"} | et


_FUSED = {"moe_router_fusion": True}
_AUX = _topk("aux_loss", moe_aux_loss_coeff=1e-2)
_BIAS = _topk(
    "none",
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=1e-3,
)

_ET = Method("et", _topk("none"), "this package, after the warm-up", et=_et("expert-threshold"))
_CAPACITY = Method(
    "et-capacity",
    _topk("none"),
    "this package with the paper's capacity C = 0.5",
    et=_et("expert-threshold", capacity_factor=0.5),
)
_EC = Method("ec", _topk("none"), "this package, warm-up routing", et=_et("expert-choice"))


def _with_kernels(method: Method, kernels: str, source: str) -> Method:
    assert method.et is not None
    et = method.et | {"kernels": kernels}
    return replace(method, name=f"{method.name}-{kernels}", source=source, et=et, needs=("gpu",))


METHODS = {
    method.name: method
    for method in (
        Method("topk", _topk("none"), "Megatron's defaults, no balancing"),
        Method("topk-fused", _topk("none", **_FUSED), "the same, fused", needs=("transformer_engine", "gpu")),
        Method("topk-aux", _AUX, "Switch Transformer (arXiv 2101.03961): coefficient 0.01"),
        Method("topk-aux-fused", _AUX | _FUSED, "the same, fused", needs=("transformer_engine", "gpu")),
        Method(
            "topk-seq-aux",
            _topk("seq_aux_loss", moe_aux_loss_coeff=3e-3),
            "DeepSeek-V2 (arXiv 2405.04434): expert-level coefficient 0.003, per sequence",
        ),
        Method("topk-bias", _BIAS, "Loss-Free Balancing (arXiv 2408.15664): sigmoid, rate 0.001"),
        Method(
            "sinkhorn", _topk("sinkhorn", moe_aux_loss_coeff=0.0), "S-BASE (arXiv 2202.01169), Megatron's own"
        ),
        Method(
            "quantile-balancing",
            _topk("quantile_balancing", moe_aux_loss_coeff=0.0),
            "Megatron-Core 0.19 and later, its defaults",
        ),
        _ET,
        _with_kernels(_ET, "triton", "this package, Triton kernels"),
        _with_kernels(_ET, "cuda", "this package, CUDA kernel"),
        _CAPACITY,
        _with_kernels(_CAPACITY, "cuda", "the same, CUDA kernels"),
        _EC,
        _with_kernels(_EC, "cuda", "the same, CUDA kernels"),
    )
}

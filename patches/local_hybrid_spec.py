"""A hybrid stack of Megatron's local layers: attention (*) and MoE (E), for `--spec local_hybrid_spec STACK`.

Megatron's own hybrid spec is made of Transformer Engine's layers, which a machine without GPU lacks. Mamba
layers (M) need mamba_ssm and a GPU: this stack has none. It has no final norm either, which Megatron builds
with Transformer Engine whatever the spec says.
"""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Layers
except ImportError:  # before 0.18
    from megatron.core.ssm.mamba_block import MambaStack as Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as Layers

ATTENTION = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=DotProductAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

MOE = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        # Any number of experts but None: the layer reads its own from the configuration.
        mlp=get_moe_module_spec(use_te=False, num_experts=1),
        mlp_bda=get_bias_dropout_add,
    ),
)

STACK = ModuleSpec(
    module=Stack,
    params={"post_layer_norm": False},
    submodules=Layers(attention_layer=ATTENTION, moe_layer=MOE),
)

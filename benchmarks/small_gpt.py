"""The small GPT that tests and CPU benchmarks train: a dense first layer and three MoE layers."""

_FLAGS = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --seq-length 64 --max-position-embeddings 64
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 128
    --num-experts 8 --moe-router-topk 2 --moe-layer-freq [0,1,1,1] --moe-token-dispatcher-type alltoall
    --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 48
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --split 90,5,5
    --micro-batch-size 2 --global-batch-size 8 --use-distributed-optimizer
    --lr 2e-3 --lr-decay-style constant --lr-decay-iters 100 --override-opt-param-scheduler
    --log-interval 1
"""
SMALL_GPT = _FLAGS.split()
"""Megatron flags; dropout stays at Megatron's default."""

#!/usr/bin/env bash
# What a login node would ask, as the image's user: usage smoke.sh MEGATRON. It fails if a seam does not bind here.
set -euo pipefail
megatron=${1:?usage: smoke.sh MEGATRON}

model=(--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128)
moe=(--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 128 --moe-shared-expert-intermediate-size 128)
training=(--micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
  --vocab-size 1024)
# Without a GPU Megatron assumes a Hopper, and some versions ask for this there.
CUDA_DEVICE_MAX_CONNECTIONS=1 megatron-et check "$megatron/pretrain_gpt.py" \
  "${model[@]}" "${moe[@]}" "${training[@]}" --moe-router-type expert-threshold --moe-et-warmup-steps 5

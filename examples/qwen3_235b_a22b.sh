#!/usr/bin/env bash
# Qwen3-235B-A22B (arXiv 2505.09388; sizes of Qwen/Qwen3-235B-A22B's config.json): 235 B parameters, 22 B active.
#
#   NNODES=64 DRY_RUN=1 bash examples/qwen3_235b_a22b.sh          512 GPUs; 64 are enough with the optimizer in host memory
#   NNODES=64 DRY_RUN=1 ROUTER=topk-bias bash examples/qwen3_235b_a22b.sh
#
# The authors published no learning rate and no batch size: those here are usual ones for such a model.
# Every variable: examples/README.md.
set -euo pipefail
# shellcheck source=common/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/start.sh"

: "${NUM_LAYERS:=94}" "${HIDDEN_SIZE:=4096}" "${FFN_HIDDEN_SIZE:=12288}"
: "${NUM_ATTENTION_HEADS:=64}" "${NUM_QUERY_GROUPS:=4}" "${KV_CHANNELS:=128}" "${SEQ_LENGTH:=4096}" "${VOCAB_SIZE:=151936}"
: "${NUM_EXPERTS:=128}" "${TOPK:=8}" "${MOE_FFN_HIDDEN_SIZE:=1536}"
: "${SHARED_EXPERT:=0}" "${SHARED_EXPERT_SIZE:=$MOE_FFN_HIDDEN_SIZE}"
((SHARED_EXPERT)) || SHARED_EXPERT_SIZE=0 # Qwen3 has none
: "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=2048}"
: "${TRAIN_STEPS:=25000}" "${LR_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 10)))}" "${LR:=2e-4}" "${MIN_LR:=2e-5}"
: "${ET_EMA_DECAY:=0.99}" "${ET_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 4)))}"

# A node holds all experts of a stage. 94 layers, with embedding and loss as one layer each, are 8 stages of 12. Of the MoE
# layers only the inputs are kept: with 8 experts a token they would be most of the activations.
: "${TP:=2}" "${PP:=8}" "${VPP:=4}" "${EP:=8}" "${RECOMPUTE:=selective}" "${RECOMPUTE_MODULES:=moe layernorm}"
((WORLD_SIZE >= 128)) || : "${OFFLOAD:=1}"
: "${OPTIMIZER:=adam}"
parallel_args
((PP == 1)) || MODEL_PARALLEL_ARGS+=(--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split)
optimizer_args

MODEL_ARGS=(
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
  --num-attention-heads "$NUM_ATTENTION_HEADS" --group-query-attention --num-query-groups "$NUM_QUERY_GROUPS"
  --kv-channels "$KV_CHANNELS" --qk-layernorm --seq-length "$SEQ_LENGTH" --max-position-embeddings 40960
  --position-embedding-type rope --rotary-base 1000000 --swiglu --normalization RMSNorm --norm-epsilon 1e-6
  --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
MOE_ARGS=(
  --num-experts "$NUM_EXPERTS" --moe-router-topk "$TOPK" --moe-router-dtype fp32
  --moe-ffn-hidden-size "$MOE_FFN_HIDDEN_SIZE"
)
((SHARED_EXPERT_SIZE == 0)) || MOE_ARGS+=(--moe-shared-expert-intermediate-size "$SHARED_EXPERT_SIZE")
TRAINING_ARGS=(
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$TRAIN_STEPS"
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-iters "$LR_WARMUP_STEPS"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
launch "$@"

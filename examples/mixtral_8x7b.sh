#!/usr/bin/env bash
# Mixtral 8x7B (arXiv 2401.04088; sizes of mistralai/Mixtral-8x7B-v0.1's config.json): 46.7 B parameters, 12.9 B active.
#
#   bash examples/mixtral_8x7b.sh                                 one node of 8 GPUs, the optimizer's state in host memory
#   NNODES=8 DRY_RUN=1 ROUTER=topk-aux bash examples/mixtral_8x7b.sh
#
# The authors published no training recipe: learning rate and schedule are those of Megatron's own Mixtral example.
# Every variable: examples/README.md.
set -euo pipefail
# shellcheck source=common/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/start.sh"

: "${NUM_LAYERS:=32}" "${HIDDEN_SIZE:=4096}" "${FFN_HIDDEN_SIZE:=14336}"
: "${NUM_ATTENTION_HEADS:=32}" "${NUM_QUERY_GROUPS:=8}" "${KV_CHANNELS:=128}" "${SEQ_LENGTH:=4096}" "${VOCAB_SIZE:=32000}"
: "${NUM_EXPERTS:=8}" "${TOPK:=2}" "${MOE_FFN_HIDDEN_SIZE:=14336}"
: "${SHARED_EXPERT:=0}" "${SHARED_EXPERT_SIZE:=$MOE_FFN_HIDDEN_SIZE}"
((SHARED_EXPERT)) || SHARED_EXPERT_SIZE=0 # Mixtral has none
: "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=1024}"
: "${TRAIN_STEPS:=25000}" "${LR_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 10)))}" "${LR:=1e-4}" "${MIN_LR:=1e-5}"
: "${ET_EMA_DECAY:=0.99}" "${ET_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 4)))}"

if ((WORLD_SIZE >= 64)); then # a node holds all experts of a stage; DP grows with the nodes
  : "${PP:=4}" "${VPP:=8}" "${EP:=8}" "${RECOMPUTE:=selective}"
else # 18 bytes a parameter do not fit into 8 x 80 GiB
  : "${PP:=1}" "${EP:=8}" "${OFFLOAD:=1}" "${RECOMPUTE:=full}"
fi
: "${OPTIMIZER:=adam}"
parallel_args
optimizer_args

MODEL_ARGS=(
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
  --num-attention-heads "$NUM_ATTENTION_HEADS" --group-query-attention --num-query-groups "$NUM_QUERY_GROUPS"
  --kv-channels "$KV_CHANNELS" --seq-length "$SEQ_LENGTH" --max-position-embeddings 32768
  --position-embedding-type rope --rotary-base 1000000 --swiglu --normalization RMSNorm --norm-epsilon 1e-5
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

#!/usr/bin/env bash
# The paper's d20 (arXiv 2603.11535): 20 layers of width 1280, the first one dense, then 16 routed experts + 1 shared, each
# half as wide as the dense layer; 2.43 B parameters, 0.56 B active. 11.2 B tokens in 21,362 steps of 0.5 M.
#
#   bash examples/d20.sh                                          one node, Expert Threshold
#   DRY_RUN=1 ROUTER=topk-aux PRECISION=fp8 bash examples/d20.sh
#
# As in the authors' code: sizes, ReLU^2, no biases, rotary embeddings, norm of queries and keys, untied embeddings, batch,
# constant learning rate with a linear decay over the last fifth, no weight decay, Muon. Not to be had from Megatron's
# flags: norms without weights, their initialisation, and a learning rate of its own for the embedding (theirs is 0.2).
# Every variable: examples/README.md.
set -euo pipefail
# shellcheck source=common/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/start.sh"

: "${NUM_LAYERS:=20}" "${DENSE_LAYERS:=1}" "${HIDDEN_SIZE:=1280}" "${FFN_HIDDEN_SIZE:=5120}"
: "${NUM_ATTENTION_HEADS:=10}" "${KV_CHANNELS:=128}" "${SEQ_LENGTH:=2048}" "${VOCAB_SIZE:=65536}"
: "${NUM_EXPERTS:=16}" "${TOPK:=1}" "${MOE_FFN_HIDDEN_SIZE:=2560}" "${SHARED_EXPERT_SIZE:=2560}"
: "${GLOBAL_BATCH_SIZE:=256}" "${MICRO_BATCH_SIZE:=$(least 8 $(((GLOBAL_BATCH_SIZE + WORLD_SIZE - 1) / WORLD_SIZE)))}"
: "${TRAIN_STEPS:=21362}" "${LR_WARMUP_STEPS:=0}" "${LR_DECAY_STEPS:=$((TRAIN_STEPS / 5))}"
: "${ET_EMA_DECAY:=0.999}" "${ET_WARMUP_STEPS:=$(least 4000 $((TRAIN_STEPS / 4)))}"

parallel_args # whole on every GPU
optimizer_args

MODEL_ARGS=(
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
  --num-attention-heads "$NUM_ATTENTION_HEADS" --kv-channels "$KV_CHANNELS" --qk-layernorm
  --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH" --position-embedding-type rope
  --squared-relu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0
)
MOE_ARGS=(
  --num-experts "$NUM_EXPERTS" --moe-router-topk "$TOPK" --moe-router-dtype fp32
  --moe-layer-freq "([0]*$DENSE_LAYERS+[1]*$((NUM_LAYERS - DENSE_LAYERS)))"
  --moe-ffn-hidden-size "$MOE_FFN_HIDDEN_SIZE" --moe-shared-expert-intermediate-size "$SHARED_EXPERT_SIZE"
)
# The authors' Muon steps at 0.02 * sqrt(max(1, rows / columns)). Megatron's, scaled as optimizer_args does it, steps at
# LR * 0.2 * sqrt(max(rows, columns)): equal for LR = 0.02 / (0.2 * sqrt(1280)) = 0.0028. That is also near the 0.0031 of their
# output layer (0.004 * sqrt(768 / 1280)). AdamW, where Muon cannot run, is not the paper's.
if [[ $OPTIMIZER == muon ]]; then : "${LR:=2.8e-3}"; else : "${LR:=6e-4}"; fi
TRAINING_ARGS=(
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$TRAIN_STEPS"
  --lr "$LR" --min-lr 0 --lr-warmup-iters "$LR_WARMUP_STEPS"
  --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters "$LR_DECAY_STEPS"
  --adam-beta1 0.8 --adam-beta2 0.95 --weight-decay 0 --clip-grad 1.0
)
launch "$@"

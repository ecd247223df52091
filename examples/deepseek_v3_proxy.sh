#!/usr/bin/env bash
# A proxy of DeepSeek-V3 (arXiv 2412.19437; sizes of deepseek-ai/DeepSeek-V3's config.json): its layers as they are (multi-head
# latent attention, 8 routed experts a token + 1 shared, one multi-token-prediction head), but 4 of them instead of 61, the
# first one dense instead of three, and 64 experts instead of 256, so that a node of 8 GPUs trains it.
#
#   bash examples/deepseek_v3_proxy.sh                            one node
#   ROUTER=topk-bias DRY_RUN=1 bash examples/deepseek_v3_proxy.sh
#   NUM_LAYERS=61 DENSE_LAYERS=3 NUM_EXPERTS=256 ...              the real one: choose PP and EP for your cluster
#
# Left out of all routers: the limit of 4 expert groups a token (common/router.sh). Every variable: examples/README.md.
set -euo pipefail
# shellcheck source=common/start.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/start.sh"

: "${NUM_LAYERS:=4}" "${DENSE_LAYERS:=1}" "${HIDDEN_SIZE:=7168}" "${FFN_HIDDEN_SIZE:=18432}" "${NUM_ATTENTION_HEADS:=128}"
: "${Q_LORA_RANK:=1536}" "${KV_LORA_RANK:=512}" "${QK_HEAD_DIM:=128}" "${QK_POS_EMB_HEAD_DIM:=64}" "${V_HEAD_DIM:=128}"
: "${MLA:=1}" # the CPU toy has plain attention: without Transformer Engine Megatron's has no MLA
: "${SEQ_LENGTH:=4096}" "${VOCAB_SIZE:=129280}" "${MTP_LAYERS:=1}"
: "${NUM_EXPERTS:=64}" "${TOPK:=8}" "${MOE_FFN_HIDDEN_SIZE:=2048}" "${SHARED_EXPERT_SIZE:=2048}"
: "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=512}"
: "${TRAIN_STEPS:=25000}" "${LR_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 10)))}" "${LR:=2.2e-4}" "${MIN_LR:=2.2e-5}"
: "${ET_EMA_DECAY:=0.99}" "${ET_WARMUP_STEPS:=$(least 2000 $((TRAIN_STEPS / 4)))}"

: "${EP:=8}" "${RECOMPUTE:=selective}" "${RECOMPUTE_MODULES:=moe_act layernorm mla_up_proj}"
: "${OPTIMIZER:=adam}"
parallel_args
optimizer_args

MODEL_ARGS=(
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
  --num-attention-heads "$NUM_ATTENTION_HEADS" --qk-layernorm
  --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH" --position-embedding-type rope
  --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --init-method-std 0.006
  --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
if ((MLA)); then
  MODEL_ARGS+=(
    --multi-latent-attention --q-lora-rank "$Q_LORA_RANK" --kv-lora-rank "$KV_LORA_RANK"
    --qk-head-dim "$QK_HEAD_DIM" --qk-pos-emb-head-dim "$QK_POS_EMB_HEAD_DIM" --v-head-dim "$V_HEAD_DIM"
    --rope-type rope --no-rope-fusion # pretrained without YaRN, and Megatron's MLA has the fused kernel for YaRN only
  )
fi
((MTP_LAYERS == 0)) || MODEL_ARGS+=(--mtp-num-layers "$MTP_LAYERS" --mtp-loss-scaling-factor 0.3)
MOE_ARGS=(
  --num-experts "$NUM_EXPERTS" --moe-router-topk "$TOPK" --moe-router-dtype fp32
  --moe-layer-freq "([0]*$DENSE_LAYERS+[1]*$((NUM_LAYERS - DENSE_LAYERS)))"
  --moe-ffn-hidden-size "$MOE_FFN_HIDDEN_SIZE" --moe-shared-expert-intermediate-size "$SHARED_EXPERT_SIZE"
)
TRAINING_ARGS=(
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$TRAIN_STEPS"
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-iters "$LR_WARMUP_STEPS"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
launch "$@"

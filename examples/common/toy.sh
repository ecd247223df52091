# shellcheck shell=bash
# MEGATRON_ET_CPU=1 trains any example in a toy size on CPU and gloo, for tests and for a job script's first trial.
# Which layers are MoE layers and topk stay the model's own. Every value can be set from the environment.

if on_cpu; then
  : "${NUM_LAYERS:=3}" "${HIDDEN_SIZE:=64}" "${FFN_HIDDEN_SIZE:=96}" "${VOCAB_SIZE:=512}" "${SEQ_LENGTH:=64}"
  : "${NUM_ATTENTION_HEADS:=4}" "${NUM_QUERY_GROUPS:=2}" "${KV_CHANNELS:=16}"
  : "${MLA:=0}" # Megatron's own attention, without Transformer Engine, has no multi-head latent attention
  : "${NUM_EXPERTS:=16}" "${MOE_FFN_HIDDEN_SIZE:=48}" "${SHARED_EXPERT_SIZE:=48}"
  # Two tokens' experts on two ranks where the number of processes allows it.
  : "${TP:=1}" "${PP:=1}" "${CP:=1}" "${EP:=$((WORLD_SIZE % 2 ? 1 : 2))}"
  : "${MICRO_BATCH_SIZE:=2}" "${GLOBAL_BATCH_SIZE:=$((4 * WORLD_SIZE))}"
  : "${TRAIN_STEPS:=6}" "${LR_WARMUP_STEPS:=1}" "${ET_WARMUP_STEPS:=2}" "${ET_EMA_DECAY:=0.9}"
  : "${SAVE_INTERVAL:=$TRAIN_STEPS}" "${EVAL_INTERVAL:=$TRAIN_STEPS}" "${EVAL_ITERS:=1}" "${LOG_INTERVAL:=1}"
  : "${OPTIMIZER:=adam}" "${RECOMPUTE:=none}" "${OFFLOAD:=0}"
fi

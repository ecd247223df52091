# shellcheck shell=bash
# Arrays that all examples share: DATA_ARGS, LOGGING_ARGS, PRECISION_ARGS, OPTIMIZER_ARGS, PERFORMANCE_ARGS, and the
# flags of a parallel layout. Functions, called when the example has set its sizes.

PRECISION=${PRECISION:-bf16}
RUN_DIR=${RUN_DIR:-runs/$MODEL-$ROUTER-$PRECISION}

data_args() {
  if [[ -z ${DATA_PATH:-} ]]; then
    note "DATA_PATH is unset: Megatron's mock data, a test of the machinery; its loss means nothing"
    # The last id of the vocabulary is the end of a document.
    DATA_ARGS=(--mock-data --tokenizer-type NullTokenizer --vocab-size $((VOCAB_SIZE - 1)))
  else
    [[ -n ${TOKENIZER_MODEL:-} ]] ||
      die "DATA_PATH is set and TOKENIZER_MODEL is not: name the tokenizer that the data was prepared with"
    local blend
    read -ra blend <<<"$DATA_PATH" # one prefix, or a blend: "0.7 code 0.3 prose"
    if [[ -z ${TOKENIZER_TYPE:-} ]]; then
      [[ -f $TOKENIZER_MODEL ]] && TOKENIZER_TYPE=SentencePieceTokenizer || TOKENIZER_TYPE=HuggingFaceTokenizer
    fi
    DATA_ARGS=(--data-path "${blend[@]}" --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL")
  fi
  DATA_ARGS+=(--split "${SPLIT:=99,1,0}" --data-cache-path "${DATA_CACHE:=$RUN_DIR/cache}")
}

logging_args() {
  LOGGING_ARGS=(--save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval "${SAVE_INTERVAL:=1000}")
  LOGGING_ARGS+=(--eval-interval "${EVAL_INTERVAL:=1000}" --eval-iters "${EVAL_ITERS:=10}")
  LOGGING_ARGS+=(--log-interval "${LOG_INTERVAL:=10}" --log-throughput)
  LOGGING_ARGS+=(--tensorboard-dir "$RUN_DIR/tensorboard" --tensorboard-log-interval "$LOG_INTERVAL")
}

precision_args() { # docs/fp8.md says which recipe is for which GPU
  PRECISION_ARGS=(--bf16)
  case "$PRECISION" in
    bf16) ;;
    fp8)
      ! on_cpu || die "PRECISION=fp8 needs Transformer Engine and a GPU; the CPU backend computes in bf16"
      case "${FP8_RECIPE:=blockwise}" in
        blockwise | mxfp8) PRECISION_ARGS+=(--fp8-format e4m3 --fp8-recipe "$FP8_RECIPE") ;;
        tensorwise) PRECISION_ARGS+=(--fp8-format hybrid --fp8-recipe tensorwise) ;;
        delayed)
          PRECISION_ARGS+=(--fp8-format hybrid --fp8-recipe delayed)
          PRECISION_ARGS+=(--fp8-amax-history-len 1024 --fp8-amax-compute-algo max)
          ;;
        *) die "FP8_RECIPE=$FP8_RECIPE: choose one of blockwise tensorwise delayed mxfp8" ;;
      esac
      ;;
    *) die "PRECISION=$PRECISION: choose bf16 or fp8" ;;
  esac
}

# OPTIMIZER=adam|muon, and what each Megatron needs for it. Muon is in every version from 0.16 on, but its Newton-Schulz
# iteration is in a package of its own: pip install emerging-optimizers, in the version that your Megatron pins.
optimizer_args() {
  if [[ -z ${OPTIMIZER:-} ]]; then
    [[ $MUON == muon ]] && OPTIMIZER=muon || OPTIMIZER=adam
    [[ $MUON == muon ]] || note "AdamW and not the paper's Muon: no package emerging_optimizers here"
  fi
  case "$OPTIMIZER" in
    adam)
      OPTIMIZER_ARGS=(--optimizer adam --use-distributed-optimizer)
      ;;
    muon)
      # Scaled to AdamW's size of a step, so that one learning rate serves matrices and the rest (arXiv 2502.16982).
      OPTIMIZER_ARGS=(--muon-momentum 0.95 --muon-scale-mode spectral --muon-extra-scale-factor 0.2)
      if megatron_has muon-nesterov; then
        OPTIMIZER_ARGS+=(--optimizer muon --use-distributed-optimizer --muon-nesterov)
      else # 0.16 and 0.17
        OPTIMIZER_ARGS+=(--optimizer dist_muon --muon-use-nesterov)
        note "Megatron-Core $MEGATRON_VERSION: Muon as dist_muon (0.18 and later: muon with the distributed optimizer)"
      fi
      ;;
    *) die "OPTIMIZER=$OPTIMIZER: choose adam or muon" ;;
  esac
  if ((${OFFLOAD:=0})); then
    [[ $OPTIMIZER == adam ]] || die "OFFLOAD=1 goes with OPTIMIZER=adam only"
    note "OFFLOAD=$OFFLOAD: the optimizer's state is in the host's memory, and its step is on the CPU: slow"
    OPTIMIZER_ARGS+=(--optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d)
  fi
}

# Kernels and overlaps of the GPU, nothing that changes the model. RECOMPUTE=none|selective|full trades time for memory.
performance_args() {
  PERFORMANCE_ARGS=()
  on_cpu || {
    PERFORMANCE_ARGS+=(--moe-grouped-gemm --moe-permute-fusion --cross-entropy-loss-fusion)
    PERFORMANCE_ARGS+=(--manual-gc --manual-gc-interval 100) # ranks collect their garbage at the same step
    [[ $OPTIMIZER != adam ]] || PERFORMANCE_ARGS+=(--overlap-grad-reduce --overlap-param-gather) # Muon: not on 0.16
  }
  case "${DISPATCHER:=alltoall}" in # docs/dispatchers.md
    alltoall | allgather) PERFORMANCE_ARGS+=(--moe-token-dispatcher-type "$DISPATCHER") ;;
    deepep | hybridep)
      PERFORMANCE_ARGS+=(--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend "$DISPATCHER")
      [[ $DISPATCHER != deepep ]] || note "DeepEP bounds a token's experts under ROUTER=et and ec (docs/dispatchers.md)"
      ;;
    *) die "DISPATCHER=$DISPATCHER: choose one of alltoall allgather deepep hybridep" ;;
  esac
  case "${RECOMPUTE:=none}" in
    none) ;;
    selective)
      local modules
      read -ra modules <<<"${RECOMPUTE_MODULES:=moe_act layernorm}"
      PERFORMANCE_ARGS+=(--recompute-granularity selective --recompute-modules "${modules[@]}")
      ;;
    full) PERFORMANCE_ARGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
    *) die "RECOMPUTE=$RECOMPUTE: choose none, selective or full" ;;
  esac
}

parallel_args() {
  MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size "${TP:=1}" --pipeline-model-parallel-size "${PP:=1}")
  MODEL_PARALLEL_ARGS+=(--expert-model-parallel-size "${EP:=1}" --expert-tensor-parallel-size "${ETP:=1}")
  MODEL_PARALLEL_ARGS+=(--context-parallel-size "${CP:=1}")
  ((TP == 1)) || MODEL_PARALLEL_ARGS+=(--sequence-parallel)
  if ((PP > 1 && ${VPP:=1} > 1)); then
    MODEL_PARALLEL_ARGS+=(--num-virtual-stages-per-pipeline-rank "$VPP")
  fi
}

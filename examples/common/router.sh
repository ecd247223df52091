# shellcheck shell=bash
# The only place where the runs of one model differ: ROUTER -> ET_ARGS.
#
# All of them route topk experts for a token: top-k exactly, Expert Threshold (ET) and Expert Choice (EC) on average.
# All of them compute logits in fp32 (MOE_ARGS of each example), and none drops a token.

ROUTER=${ROUTER:-et}
ROUTERS=(et ec topk-aux topk-bias quantile-balancing)

router_args() {
  # The pool of Expert Choice is all ranks' tokens of a micro-batch step: from pools of 8 thousand tokens on the paper's
  # losses hardly differ, one of 2 thousand, a rank's micro-batch of a large model, costs 0.07 (arXiv 2603.11535).
  local pool=(--moe-et-pool "${ET_POOL:=global}" --moe-et-ema-decay "$ET_EMA_DECAY" --moe-et-trace-dir "$RUN_DIR")
  case "$ROUTER" in
    et)
      ET_ARGS=(--moe-router-type expert-threshold --moe-et-warmup-steps "$ET_WARMUP_STEPS" "${pool[@]}")
      [[ -z ${ET_CAPACITY_FACTOR:-} ]] || ET_ARGS+=(--moe-et-capacity-factor "$ET_CAPACITY_FACTOR")
      ;;
    ec)
      ET_ARGS=(--moe-router-type expert-choice "${pool[@]}")
      ;;
    topk-aux)
      top_k_scores
      ET_ARGS=(--moe-router-type topk "${SCORES[@]}" "${AUX_LOSS[@]}")
      ;;
    topk-bias)
      # Loss-free balancing, as its authors advise: sigmoid gates and an update rate of 1e-3 (arXiv 2408.15664), and the
      # sequence-wise loss of 1e-4 beside it that DeepSeek-V3 (arXiv 2412.19437, 4.2) keeps against extremes within a sequence.
      # Its bias is not annealed to 0 at the end, as DeepSeek-V3's is: Megatron has no schedule for it.
      top_k_scores
      ET_ARGS=(--moe-router-type topk --moe-router-score-function sigmoid "${SCALING[@]}")
      ET_ARGS+=(--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3)
      ET_ARGS+=(--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4)
      ;;
    quantile-balancing)
      megatron_has quantile_balancing ||
        die "ROUTER=quantile-balancing needs Megatron-Core 0.19 or newer, this is $MEGATRON_VERSION"
      # Replaces the balancing and nothing else, so gates stay those of topk-aux. Without memory
      # (--moe-router-quantile-balancing-ema 0), Megatron's default and its tests'.
      top_k_scores
      ET_ARGS=(--moe-router-type topk "${SCORES[@]}")
      ET_ARGS+=(--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0)
      ;;
    *)
      die "ROUTER=$ROUTER: choose one of ${ROUTERS[*]}"
      ;;
  esac
  if [[ $ROUTER == et || $ROUTER == ec ]] && ! ((SHARED_EXPERT_SIZE)); then
    note "no shared expert: a token that no routed expert takes has the residual only." \
      "SHARED_EXPERT=1 adds one to every router of this model (examples/README.md)"
  fi
}

# How the authors of each model score and balance top-k: SCORES (with SCALING in it) and AUX_LOSS.
top_k_scores() {
  SCALING=()
  case "$MODEL" in
    d12 | d20)
      # The paper's token-choice baseline: sigmoid gates, auxiliary loss of 0.001 (arXiv 2603.11535). Its code's
      # default configuration has no balancing at all; Switch Transformer's own weight is 0.01 (arXiv 2101.03961, 2.2).
      SCORES=(--moe-router-score-function sigmoid)
      AUX_LOSS=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3)
      ;;
    mixtral_8x7b)
      # Softmax over the two chosen logits (arXiv 2401.04088, 2.1); router_aux_loss_coef 0.02 of its config.json.
      SCORES=(--moe-router-score-function softmax)
      AUX_LOSS=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 2e-2)
      ;;
    qwen3_*)
      # Softmax renormalised over the chosen (norm_topk_prob), which is the softmax of their logits; router_aux_loss_coef 0.001
      # of its config.json; the loss is that of the global batch (Qwen3 report, arXiv 2505.09388, 2; arXiv 2501.11873).
      SCORES=(--moe-router-score-function softmax)
      AUX_LOSS=(--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3)
      ;;
    deepseek_*)
      # What DeepSeek-V3 compares its loss-free balancing with (arXiv 2412.19437, 4.5.2): sigmoid gates normalised over the
      # chosen, and DeepSeek-V2's loss, sequence by sequence with 0.003 (arXiv 2405.04434, 3.1.2). 2.5 is routed_scaling_factor
      # of its config.json. Its limit of 4 expert groups a token is left out of all routers: it bounds traffic and is no part
      # of the balancing, and thresholds have no top-k to pick among groups.
      SCALING=(--moe-router-topk-scaling-factor 2.5)
      SCORES=(--moe-router-score-function sigmoid "${SCALING[@]}")
      AUX_LOSS=(--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 3e-3)
      ;;
    *)
      # A model of your own: Switch Transformer's and ST-MoE's weight (arXiv 2101.03961, 2202.08906).
      SCORES=(--moe-router-score-function softmax)
      AUX_LOSS=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2)
      ((TOPK > 1)) || SCORES+=(--moe-router-pre-softmax) # the softmax of one chosen logit is 1
      ;;
  esac
}

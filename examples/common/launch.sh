# shellcheck shell=bash
# launch "$@": says what will run, checks the layout, and becomes torchrun.
#   DRY_RUN=1        prints the command and the layout, and lets Megatron judge the flags (some seconds, no GPU)
#   DRY_RUN=command  prints the command and the layout only
# What is printed is a shell script, its remarks are comments.

revision() { # of a checkout, as git knows it
  local commit
  commit=$(git -c safe.directory='*' -C "$1" rev-parse HEAD 2>/dev/null) || { echo "not a git checkout" && return; }
  [[ -z $(git -c safe.directory='*' -C "$1" status --porcelain --untracked-files=no) ]] || commit+=" with changes"
  echo "$commit"
}

COMMAND=""
add_line() { # words of the command, quoted for a shell, on a line of their own
  (($#)) || return 0
  local words
  printf -v words ' %q' "$@"
  COMMAND+=${COMMAND:+$' \\\n '}${words# }
}

launch() {
  data_args
  router_args
  precision_args
  logging_args
  performance_args
  local flags=(
    "${MODEL_PARALLEL_ARGS[@]}" "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${ET_ARGS[@]}" "${DATA_ARGS[@]}"
    "${TRAINING_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PRECISION_ARGS[@]}" "${PERFORMANCE_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"
  )
  local said
  said=$(WORLD_SIZE=$WORLD_SIZE LOCAL_WORLD_SIZE=$NPROC_PER_NODE GPU_MEMORY_GIB=$GPU_MEMORY_GIB VOCAB_SIZE=$VOCAB_SIZE \
    "$PYTHON" "$EXAMPLES/common/layout.py" "${flags[@]}" 2>&1) || die "$said"
  if ((NODE_RANK == 0)) || [[ -n $DRY_RUN ]]; then
    echo "# $MODEL, ROUTER=$ROUTER, PRECISION=$PRECISION, RUN_DIR=$RUN_DIR"
    echo "# megatron_et: $(revision "$REPOSITORY")"
    echo "# Megatron-Core $MEGATRON_VERSION: ${MEGATRON:+$(revision "$MEGATRON") in }$(dirname "$(dirname "$MEGATRON_FLAGS")")"
    local line
    for line in "${NOTES[@]}"; do echo "# note: $line"; done
    printf '# layout\n%s\n' "$said"
    add_line env "${ENVIRONMENT[@]}"
    add_line "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}" "${SCRIPT[@]}"
    add_line "${MODEL_PARALLEL_ARGS[@]}"
    add_line "${MODEL_ARGS[@]}"
    add_line "${MOE_ARGS[@]}"
    add_line "${ET_ARGS[@]}"
    add_line "${DATA_ARGS[@]}"
    add_line "${TRAINING_ARGS[@]}"
    add_line "${OPTIMIZER_ARGS[@]}"
    add_line "${PRECISION_ARGS[@]}"
    add_line "${PERFORMANCE_ARGS[@]}"
    add_line "${LOGGING_ARGS[@]}"
    add_line "$@"
    echo "$COMMAND"
  fi
  case "$DRY_RUN" in
    "") exec env "${ENVIRONMENT[@]}" "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}" "${SCRIPT[@]}" "${flags[@]}" ;;
    command) ;;
    1)
      env "${ENVIRONMENT[@]}" WORLD_SIZE="$WORLD_SIZE" MEGATRON="${MEGATRON:-}" "$PYTHON" -W ignore \
        "$EXAMPLES/common/check.py" "${flags[@]}" || die "something is REFUSED above"
      ;;
    *) die "DRY_RUN=$DRY_RUN: choose 1 or command" ;;
  esac
}

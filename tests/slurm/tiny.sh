#!/bin/bash
set -euo pipefail
# shellcheck disable=SC2086
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$SLURM_JOB_ID" \
    -m megatron_et.pretrain_gpt $TINY_ARGS --train-iters "$TRAIN_STEPS" --load "$RUN_DIR/checkpoints" --save "$RUN_DIR/checkpoints" --moe-et-trace-dir "$RUN_DIR" "$@"

#!/bin/bash
# A shell, or one command, on a single node with all its GPUs. From the repository's root:
#
#   bash examples/slurm/interactive.sh [srun options] [-- command]
#   bash examples/slurm/interactive.sh --partition=debug -- bash examples/d12.sh
#
# The example scripts take the node's GPUs from SLURM. CONTAINER_IMAGE and CONTAINER_MOUNTS as in docs/slurm.md.
set -euo pipefail
# shellcheck source=common.sh
source examples/slurm/common.sh || { echo "start from the repository's root: no examples/slurm/ in $PWD"; exit 2; }

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
command=("${@:2}")
((${#command[@]})) || command=(bash)
[[ -t 0 ]] && options=(--pty "${options[@]}")

container_args
exec srun --nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=96 --mem=0 --exclusive --time=01:00:00 \
  "${options[@]}" "${CONTAINER_ARGS[@]}" "${command[@]}"

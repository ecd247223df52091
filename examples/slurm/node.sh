#!/bin/bash
# What train.sbatch and interactive.sh run once on each node, inside the container where there is one.
#
# Signals, and why: docs/slurm.md#signals. SIGINT makes the ranks save and end. SIGTERM, with which SLURM announces
# that it will take the node, makes this script send SIGINT to the ranks. SLURM sends either to every process.

set -euo pipefail

export NODE_RANK=${SLURM_NODEID:-0}
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun shall wait for its ranks and do nothing else: by itself it would pass these signals on to the ranks and
# to Megatron's checkpoint helper, kill them after 30 s and report a failure. (PET_X is torchrun's --x.)
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGHUP,SIGQUIT}
# No restarts inside the job: a lost node can't be replaced there, and helpers of killed ranks would add up.
export PET_MAX_RESTARTS=0

# SIGINT to all processes below one.
interrupt_below() {
    local child children
    children=$(cat "/proc/$1/task"/*/children 2>/dev/null) || true
    for child in $children; do
        interrupt_below "$child"
        kill -INT "$child" 2>/dev/null || true
    done
}

stopping=""
trap 'stopping=yes' TERM
trap : INT
(
    trap '' INT TERM  # ignored signals stay ignored in all processes below, unless one installs a handler
    exec bash "examples/$MODEL.sh" --exit-signal-handler --exit-signal SIGINT "$@"
) &
pid=$!
while kill -0 "$pid" 2>/dev/null; do
    if [[ -z $stopping ]]; then
        wait "$pid" || true  # a trapped signal ends the wait, not the process
    else
        interrupt_below "$pid"
        sleep 2  # again and again: a rank has no ears before Megatron's start-up
    fi
done
wait "$pid"

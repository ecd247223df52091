#!/bin/bash
# What train.sbatch runs once on each node, inside the container where there is one.
#
# Signals, and why: docs/slurm.md. SLURM sends them to every process of the node. This script turns SIGTERM, by which
# SLURM announces that it will take the node, and SIGUSR1 from train.sbatch into SIGINT for the ranks, which save and end.

set -euo pipefail

export NODE_RANK=${SLURM_NODEID:-0}
export PYTHONUNBUFFERED=1
# torchrun shall wait for its ranks and do nothing else. By itself it passes SIGTERM and SIGINT on to the ranks and to
# Megatron's checkpoint helper, kills them after 30 s, and reports a failure. PET_X is torchrun's option --x.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGHUP,SIGQUIT}
# No restarts inside the job: docs/slurm.md says why.
export PET_MAX_RESTARTS=0

# SIGINT, once, to those of a process and all below it that have a handler for it: the ranks, from Megatron's start-up
# on. A second one may meet Python's shutdown, when handlers are gone, and turn an orderly end into a failure.
declare -A told
interrupt() {
  local child children caught
  children=$(cat "/proc/$1/task"/*/children 2>/dev/null) || true
  for child in $children; do
    interrupt "$child"
  done
  caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || true
  if [[ -z ${told[$1]:-} ]] && ((16#${caught:-0} & 1 << 1)); then
    kill -INT "$1" 2>/dev/null || true
    told[$1]=yes
  fi
}

tell_ranks() { # again and again, since a rank may still be starting
  trap '' INT TERM USR1
  : >"$STOP_FILE"
  while kill -0 "$pid" 2>/dev/null; do
    interrupt "$pid"
    sleep 1
  done
}

(
  # What is ignored here stays ignored in all processes below, unless one installs a handler of its own.
  trap '' INT TERM USR1
  exec bash "examples/$MODEL.sh" --exit-signal-handler --exit-signal SIGINT "$@"
) &
pid=$!
telling=""
trap '[[ -n $telling ]] || tell_ranks & telling=yes' TERM USR1
trap : INT
while kill -0 "$pid" 2>/dev/null; do
  wait "$pid" || true # a trapped signal ends the wait, not the process
done
wait "$pid"

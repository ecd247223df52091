# shellcheck shell=bash disable=SC2034 # what is set here is used by the scripts that source it
# Functions of train.sbatch, sweep.sbatch and interactive.sh.

# Step of the newest checkpoint that can be resumed from; 0 when there is none.
newest_step() {
  local step
  step=$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null) || step=0
  [[ $step =~ ^[0-9]+$ ]] || step=0
  echo "$step"
}

# Megatron does not write the file that names the newest checkpoint atomically. A kill at the wrong moment leaves it
# empty, and the next Megatron ends with status 0 without training. It is written again from what is complete.
mend_tracker() {
  local folder=$RUN_DIR/checkpoints tracker name step=""
  tracker=$folder/latest_checkpointed_iteration.txt
  if [[ ! -e $tracker || $(<"$tracker") =~ ^([0-9]+|release)$ ]]; then
    return
  fi
  for name in "$folder"/iter_*/metadata.json; do # written last; zero-padded, so the last name is the newest
    [[ $name =~ /iter_0*([0-9]+)/metadata.json$ && -e $name ]] && step=${BASH_REMATCH[1]}
  done
  if [[ -z $step ]]; then
    echo "$tracker is broken and no checkpoint is complete: it is set aside, training starts from the beginning"
    mv "$tracker" "$tracker.broken"
    return
  fi
  echo "$tracker is broken: written again, the newest complete checkpoint is of step $step"
  echo "$step" >"$tracker.new"
  mv "$tracker.new" "$tracker"
}

# Sets CONTAINER_ARGS for srun: pyxis' options when CONTAINER_IMAGE is set, none for a bare run.
container_args() {
  CONTAINER_ARGS=()
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    CONTAINER_ARGS=(
      --container-image="$CONTAINER_IMAGE"
      --container-mounts="$PWD:$PWD${RUN_DIR:+,$RUN_DIR:$RUN_DIR}${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
      --container-workdir="$PWD"
      --no-container-mount-home # packages in ~/.local would shadow those of the image
    )
  fi
}

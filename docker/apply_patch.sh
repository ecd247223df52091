#!/usr/bin/env bash
# `git apply`, and a look whether it did: usage apply_patch.sh PATCH FOLDER.
# Below a foreign repository git skips the files in silence; FOLDER must be a checkout of its own or below none.
set -euo pipefail
patch=$(realpath "${1:?usage: apply_patch.sh PATCH FOLDER}") folder=${2:?}

cd "$folder"
git apply "$patch"
if ! grep -q megatron_et pretrain_gpt.py; then
  echo "apply_patch.sh: $patch changed nothing in $PWD: is it below another git repository?" >&2
  exit 1
fi

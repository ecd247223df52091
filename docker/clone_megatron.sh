#!/usr/bin/env bash
# Megatron-LM at a release's tag, patched: usage clone_megatron.sh REPOSITORY VERSION COMMIT FOLDER.
# A tag can be moved and a mirror can be wrong, so the commit must be the expected one.
set -euo pipefail
repository=${1:?usage: clone_megatron.sh REPOSITORY VERSION COMMIT FOLDER} version=${2:?} commit=${3:?} folder=${4:?}
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

git -c advice.detachedHead=false clone --quiet --depth 1 --branch "core_v$version" "$repository" "$folder"
found=$(git -C "$folder" rev-parse HEAD)
if [ "$found" != "$commit" ]; then
  echo "clone_megatron.sh: core_v$version of $repository is commit $found and not $commit. If the tag was moved and you" \
    "have read what changed, build with --build-arg MEGATRON_COMMIT=$found" >&2
  exit 1
fi
bash "$here/apply_patch.sh" "$here/../patches/core_v$version.patch" "$folder"
# The checkout is root's: git refuses to tell other users its revision otherwise.
git config --system --add safe.directory "$(realpath "$folder")"
echo "Megatron-LM core_v$version, commit $commit, patched, in $folder"

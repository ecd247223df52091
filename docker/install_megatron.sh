#!/usr/bin/env bash
# A Megatron-LM checkout becomes importable, training code included: usage install_megatron.sh FOLDER SETUPTOOLS.
# It is built in pip's own temporary environment with the setuptools that this version of Megatron asks for; the packages of
# the image take no part, and nothing but the checkout is installed.
set -euo pipefail
folder=${1:?usage: install_megatron.sh FOLDER SETUPTOOLS} setuptools=${2:?}
build=$(mktemp)
trap 'rm -f "$build"' EXIT

echo "setuptools==$setuptools" > "$build"
# From pip 25.3 on the second name is read for builds, before that the first. "compat": the folder itself goes on the path,
# since older versions declare megatron.core only, and the scripts need megatron.training.
PIP_CONSTRAINT=$build PIP_BUILD_CONSTRAINT=$build \
  python3 -m pip install --no-deps --config-settings editable_mode=compat --editable "$folder"

# Megatron's setup takes a failed compilation for success, and the first training would compile as a user who may not write.
if ! compgen -G "$folder/megatron/core/datasets/helpers_cpp*.so" > /dev/null; then
  echo "install_megatron.sh: the dataset helper was not compiled in $folder/megatron/core/datasets: g++ and Python's headers" \
    "are needed" >&2
  exit 1
fi

#!/usr/bin/env bash
# megatron_et, and what it and megatron.training need beside the base image: usage install_package.sh SOURCES STATE.
# STATE is the folder that `base_packages.py record` wrote. Without --no-deps pip might touch torch.
set -euo pipefail
sources=${1:?usage: install_package.sh SOURCES STATE} state=${2:?}
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

mapfile -t missing < <(python3 "$here/base_packages.py" requirements "$sources/pyproject.toml" training report)
[ ${#missing[@]} -gt 0 ] || exit 1 # its message stands above
python3 -m pip install --constraint "$state/constraints.txt" "${missing[@]}"
# pip's temporary build environment takes setuptools from the index, whatever the image pins.
PIP_CONSTRAINT='' python3 -m pip install --no-deps "$sources"

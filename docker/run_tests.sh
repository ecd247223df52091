#!/usr/bin/env bash
# The unit tests, on CPU, with this image's torch and Megatron: usage run_tests.sh SOURCES STATE LOG.
set -euo pipefail
sources=${1:?usage: run_tests.sh SOURCES STATE LOG} state=${2:?} log=${3:?}

python3 -m pip install --constraint "$state/constraints.txt" pytest pytest-timeout hypothesis
cd "$sources"
CUDA_VISIBLE_DEVICES='' CI=true python3 -m pytest -p no:cacheprovider tests/unit 2>&1 | tee "$log"

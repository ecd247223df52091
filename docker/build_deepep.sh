#!/usr/bin/env bash
# DeepEP with HybridEP at a pinned commit, for this image's torch: usage build_deepep.sh REPOSITORY COMMIT STATE.
# STATE is the folder that `base_packages.py record` wrote. TORCH_CUDA_ARCH_LIST says for which GPUs, RDMA_CORE_HOME where HybridEP
# will look for headers and libraries when it compiles its kernels at run time.
set -euo pipefail
repository=${1:?usage: build_deepep.sh REPOSITORY COMMIT STATE} commit=${2:?} state=${3:?}
: "${TORCH_CUDA_ARCH_LIST:?for example 9.0}" "${RDMA_CORE_HOME:?a folder to create}"
cuda=${CUDA_HOME:-/usr/local/cuda}
nvshmem=3.4.5
build=$(mktemp --directory)
trap 'rm -rf "$build"' EXIT

# The kernels between nodes: InfiniBand's libraries with their headers, and NVSHMEM.
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends --allow-change-held-packages rdma-core libibverbs-dev
rm -rf /var/lib/apt/lists/*
libraries=/usr/lib/$(uname -m)-linux-gnu
[ -e "$libraries/libmlx5.so" ] || ln -s libmlx5.so.1 "$libraries/libmlx5.so"
mkdir -p "$RDMA_CORE_HOME"
ln -sfn /usr/include "$RDMA_CORE_HOME/include"
ln -sfn "$libraries" "$RDMA_CORE_HOME/lib"
python3 -m pip install --constraint "$state/constraints.txt" pynvml
python3 -m pip install --no-deps --constraint "$state/constraints.txt" "nvidia-nvshmem-cu13==$nvshmem"

git clone --quiet --no-checkout "$repository" "$build/DeepEP"
cd "$build/DeepEP"
git cat-file -e "$commit^{commit}" 2> /dev/null || git fetch --quiet origin "$commit" # it may be on no branch
git -c advice.detachedHead=false checkout --quiet "$commit"
git submodule update --quiet --init --recursive # its setup would go on without

# No driver here: its libraries are linked by the names that they have on a machine with one. The toolkit's C++ headers are not
# where DeepEP's own build looks for them.
mkdir "$build/stubs"
ln -s "$cuda/lib64/stubs/libcuda.so" "$build/stubs/libcuda.so"
ln -s "$cuda/lib64/stubs/libnvidia-ml.so" "$build/stubs/libnvidia-ml.so.1"
HYBRID_EP_MULTINODE=1 \
  LIBRARY_PATH="$build/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}" \
  CPLUS_INCLUDE_PATH="$cuda/include/cccl${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}" \
  python3 -m pip install --no-deps --no-build-isolation .

# Importing needs a driver; that the extensions are there is what can be seen without.
cd /
python3 - <<'PYTHON'
import importlib.util
import sys

missing = [name for name in ("deep_ep", "deep_ep_cpp", "hybrid_ep_cpp") if importlib.util.find_spec(name) is None]
sys.exit(f"build_deepep.sh: {', '.join(missing)} was not installed" if missing else 0)
PYTHON

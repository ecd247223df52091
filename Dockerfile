# Training on GPUs: NGC's PyTorch image as it is, Megatron-LM at a release's tag with our patch, megatron_et.
#
#   docker build --build-arg MEGATRON=0.19.0 --tag megatron_et:0.19.0 .
#
# All arguments, enroot and pyxis, and what of this has been built so far: docs/containers.md. Needs BuildKit (Docker's default
# since 23.0). For the quickstart on a laptop there is docker/cpu.Dockerfile.

ARG MEGATRON=0.19.0
ARG NGC_PYTORCH=nvcr.io/nvidia/pytorch
ARG RUN_TESTS=0
ARG WITH_DEEPEP=0

# ---- one stage for each supported version of Megatron, named after it ----------------------------------------------------------
# The base image is the one that the CI of that tag uses. MEGATRON_COMMIT is what the tag must be, MEGATRON_SETUPTOOLS what its
# pyproject.toml allows. DEEPEP_COMMIT is from that CI, too, where it names one (0.18.2, 0.19.0).

FROM ${NGC_PYTORCH}:25.11-py3 AS megatron-0.16.1
ARG MEGATRON_COMMIT=55ac7082517c3878ae653c07c09c534b8aed49f6
ARG DEEPEP_COMMIT=17cfb817bccec3a9c247013360cc550c2bac441e
ENV MEGATRON_VERSION=0.16.1 MEGATRON_COMMIT=${MEGATRON_COMMIT} MEGATRON_SETUPTOOLS=79.0.1 DEEPEP_COMMIT=${DEEPEP_COMMIT} \
    BASE_TAG=25.11-py3

FROM ${NGC_PYTORCH}:26.02-py3 AS megatron-0.17.1
ARG MEGATRON_COMMIT=266f1c97dca477ca8b92c16087506da2000b0b84
ARG DEEPEP_COMMIT=17cfb817bccec3a9c247013360cc550c2bac441e
ENV MEGATRON_VERSION=0.17.1 MEGATRON_COMMIT=${MEGATRON_COMMIT} MEGATRON_SETUPTOOLS=79.0.1 DEEPEP_COMMIT=${DEEPEP_COMMIT} \
    BASE_TAG=26.02-py3

FROM ${NGC_PYTORCH}:26.04-py3 AS megatron-0.18.2
ARG MEGATRON_COMMIT=571370c829ca768fe37244f4e2e7f28d8accc4ab
ARG DEEPEP_COMMIT=17cfb817bccec3a9c247013360cc550c2bac441e
ENV MEGATRON_VERSION=0.18.2 MEGATRON_COMMIT=${MEGATRON_COMMIT} MEGATRON_SETUPTOOLS=84.2.1 DEEPEP_COMMIT=${DEEPEP_COMMIT} \
    BASE_TAG=26.04-py3

FROM ${NGC_PYTORCH}:26.06-py3 AS megatron-0.19.0
ARG MEGATRON_COMMIT=5be9626709af2722333bf54797c954c09edeada3
ARG DEEPEP_COMMIT=de0dd1185142c727b9c118aeb4cc4702e34deeba
ENV MEGATRON_VERSION=0.19.0 MEGATRON_COMMIT=${MEGATRON_COMMIT} MEGATRON_SETUPTOOLS=84.2.1 DEEPEP_COMMIT=${DEEPEP_COMMIT} \
    BASE_TAG=26.06-py3

# A build that stops here was given an unknown version: --build-arg MEGATRON=0.16.1, 0.17.1, 0.18.2 or 0.19.0
FROM megatron-${MEGATRON} AS base

# ---- Megatron-LM and this package, the packages of the base image untouched ----------------------------------------------------

FROM base AS installed
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG MEGATRON_REPOSITORY=https://github.com/NVIDIA/Megatron-LM.git
# NGC's Python counts as the system's own, which pip refuses to add to, and building as root is what an image does.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

RUN --mount=type=bind,source=docker,target=/mnt/docker \
    python3 /mnt/docker/base_packages.py record /opt/base_packages --require torch transformer-engine

RUN --mount=type=bind,source=docker,target=/mnt/docker \
    --mount=type=bind,source=patches,target=/mnt/patches \
    --mount=type=cache,target=/root/.cache/pip \
    /mnt/docker/clone_megatron.sh "${MEGATRON_REPOSITORY}" "${MEGATRON_VERSION}" "${MEGATRON_COMMIT}" /opt/Megatron-LM \
    && /mnt/docker/install_megatron.sh /opt/Megatron-LM "${MEGATRON_SETUPTOOLS}"

COPY . /opt/megatron_et

RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/megatron_et/docker/install_package.sh /opt/megatron_et /opt/base_packages

# ---- DeepEP and HybridEP, for --moe-token-dispatcher-type flex: --build-arg WITH_DEEPEP=1 --------------------------------------

FROM installed AS deepep-0
ENV DEEPEP=none

FROM installed AS deepep-1
ARG DEEPEP_REPOSITORY=https://github.com/deepseek-ai/DeepEP.git
# Not TORCH_CUDA_ARCH_LIST: the base image sets that for all its GPUs, and an ENV beats an ARG.
ARG DEEPEP_CUDA_ARCHS=9.0
# HybridEP compiles kernels when a training starts, against the headers in RDMA_CORE_HOME.
ENV DEEPEP=${DEEPEP_COMMIT} RDMA_CORE_HOME=/opt/rdma-core/build
RUN --mount=type=cache,target=/root/.cache/pip \
    TORCH_CUDA_ARCH_LIST="${DEEPEP_CUDA_ARCHS}" \
    /opt/megatron_et/docker/build_deepep.sh "${DEEPEP_REPOSITORY}" "${DEEPEP_COMMIT}" /opt/base_packages

FROM deepep-${WITH_DEEPEP} AS complete
RUN python3 /opt/megatron_et/docker/base_packages.py check /opt/base_packages

# ---- the unit tests inside the image, what they need beside: --build-arg RUN_TESTS=1 -------------------------------------------

FROM complete AS tests-0
RUN echo "not run: the image was built with RUN_TESTS=0" > /opt/unit_tests.log

FROM complete AS tests-1
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/megatron_et/docker/run_tests.sh /opt/megatron_et /opt/base_packages /opt/unit_tests.log

FROM tests-${RUN_TESTS} AS tests

# ---- the image ------------------------------------------------------------------------------------------------------------------

FROM complete AS image
ARG NGC_PYTORCH
ARG RUN_TESTS
ARG USER_ID=1000
LABEL org.opencontainers.image.title="megatron_et" \
    org.opencontainers.image.description="Expert Threshold routing for Megatron-Core MoE layers" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${NGC_PYTORCH}:${BASE_TAG}" \
    megatron_et.megatron-lm.version="${MEGATRON_VERSION}" \
    megatron_et.megatron-lm.commit="${MEGATRON_COMMIT}" \
    megatron_et.deepep.commit="${DEEPEP}" \
    megatron_et.tests="${RUN_TESTS}"

# The base image may have a user of this number already; the home folder is what matters.
RUN useradd --no-log-init --non-unique --uid "${USER_ID}" --user-group --create-home --shell /bin/bash trainer \
    && install --directory --owner trainer --group trainer /workspace/runs
COPY --from=tests /opt/unit_tests.log /opt/unit_tests.log

USER ${USER_ID}
WORKDIR /workspace/runs
RUN /opt/megatron_et/docker/smoke.sh /opt/Megatron-LM

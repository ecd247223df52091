# The quickstart on a laptop, without a GPU: real Megatron on CPU and gloo, everything pinned in requirements.lock.
#
#   docker build --file docker/cpu.Dockerfile --tag megatron_et:cpu .
#   docker run --rm --interactive --tty --volume megatron_et_runs:/opt/megatron_et/runs megatron_et:cpu
#
# docs/containers.md says more. Needs BuildKit (Docker's default since 23.0).

FROM python:3.12-slim
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
LABEL org.opencontainers.image.title="megatron_et, quickstart on CPU" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/python:3.12-slim"

# A compiler, because parts of PyTorch compile when they are first used; git for the tests.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc git libc6-dev make

WORKDIR /opt/megatron_et

# The packages (6 GB) in a layer of their own: a change of the sources does not touch it.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv .venv \
    && .venv/bin/python -m pip install --disable-pip-version-check --no-deps --requirement requirements.lock

COPY . ./
RUN --mount=type=cache,target=/root/.cache/pip make setup

# Everything but runs/ is root's and stays as it is.
ARG USER_ID=1000
RUN useradd --no-log-init --uid "${USER_ID}" --user-group --create-home --shell /bin/bash trainer \
    && install --directory --owner trainer --group trainer runs
USER ${USER_ID}
RUN .venv/bin/megatron-et check

CMD ["make", "quickstart"]

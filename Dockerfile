# syntax=docker/dockerfile:1
# One image for every part of a deployment. Nothing that builds is left in it, nothing in it can be written, and what
# runs is nobody in particular. BASE may be any image with Python 3.11 to 3.13 and its venv module.
ARG BASE=python:3.11.11-slim-bookworm@sha256:081075da77b2b55c23c088251026fb69a7b2bf92471e491ff5fd75c192fd38e5

# What we need: a layer that stays when our code changes. With an index that has torch for CPUs alone, the image is
# several GB smaller: it carries no CUDA.
FROM ${BASE} AS needs
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/fedsim/bin/python
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/fedsim
COPY pyproject.toml constraints.txt ./
ARG PIP_EXTRA_INDEX_URL=
RUN touch README.md LICENSE && /opt/tools/bin/pip install --constraint constraints.txt '.[ray,privacy]' \
    && /opt/tools/bin/pip uninstall --yes fedsim-engine

# What we are: a few MB.
FROM needs AS ours
COPY README.md LICENSE ./
COPY fedsim fedsim
COPY clients clients
COPY server server
COPY strategies strategies
RUN /opt/tools/bin/pip install --no-deps --target /opt/ours .

FROM ${BASE}
RUN useradd --uid 10001 --create-home --home-dir /home/fedsim --shell /usr/sbin/nologin fedsim \
    && install -d -o 10001 -g 10001 -m 0700 /state /certs /certs/superlink /certs/serverapp \
    /certs/node-0 /certs/node-1 /certs/node-2 /certs/node-3 /certs/node-4
COPY --from=needs /opt/fedsim /opt/fedsim
COPY --from=ours /opt/ours /opt/ours
COPY experiments /opt/experiments
ENV PATH=/opt/ours/bin:/opt/fedsim/bin:$PATH \
    PYTHONPATH=/opt/ours \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    HF_HUB_OFFLINE=1 \
    FLWR_HOME=/state/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /state
USER 10001:10001
VOLUME ["/state"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 CMD ["fedsim", "--help"]
ENTRYPOINT []
CMD ["fedsim", "--help"]

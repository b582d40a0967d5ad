# syntax=docker/dockerfile:1
# One image for every part of a deployment. Nothing that builds is left in it, nothing in it can be written, and what
# runs is nobody in particular. The base is pinned by tag here and by digest with --build-arg BASE=python@sha256:….
ARG BASE=python:3.11.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedsim
ENV PATH=/opt/fedsim/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedsim fedsim
COPY clients clients
COPY server server
COPY strategies strategies
COPY experiments experiments
RUN pip install --constraint constraints.txt '.[ray,privacy]' && python -m compileall -q /opt/fedsim

FROM ${BASE}
RUN useradd --uid 10001 --create-home --home-dir /home/fedsim --shell /usr/sbin/nologin fedsim \
    && install -d -o 10001 -g 10001 -m 0700 /state /certs
COPY --from=build /opt/fedsim /opt/fedsim
ENV PATH=/opt/fedsim/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    HF_HUB_OFFLINE=1 \
    FLWR_HOME=/state/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /state
USER 10001:10001
VOLUME ["/state", "/certs"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 CMD ["fedsim", "--help"]
ENTRYPOINT []
CMD ["fedsim", "--help"]

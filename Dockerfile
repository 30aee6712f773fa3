# The image that pods run: this project at the versions of constraints.txt, for NVIDIA GPUs, without root.
#
#   docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t registry.example.org/pretrain:0.1.0 .
#   docker run --rm --init --gpus all --shm-size 16g registry.example.org/pretrain:0.1.0 demo
#
# CUDA, cuDNN and NCCL are those that torch's wheels bring along, at the versions that torch was built for; the driver is the host's. A base
# with CUDA would hold all of it a second time. For an older driver take another build of torch: --build-arg TORCH=... and, where it lies
# elsewhere, --build-arg PIP_EXTRA_INDEX_URL=...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH
ARG PIP_EXTRA_INDEX_URL
# All that constraints.txt pins, but for what only development needs. `remote` (S3, GCS) may be added.
ARG EXTRAS=filters,language,web,eval,ray-jobs,dashboard
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/pretrain/bin:${PATH}
# Some pinned packages come as sources.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/pretrain
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
# Everything but the code, which changes more often: without its folders the project is its dependencies.
RUN grep -v '^torch==' constraints.txt >/tmp/constraints.txt \
    && pip install "${TORCH:-$(grep '^torch==' constraints.txt)}" \
    && pip install ".[${EXTRAS}]" -c /tmp/constraints.txt
COPY . .
RUN pip install --no-deps --force-reinstall . && pip check

FROM ${BASE}
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=pretrain \
    org.opencontainers.image.licenses=Apache-2.0 \
    org.opencontainers.image.revision=${COMMIT}
# g++: torch.compile and DeepSpeed's CPUAdam compile while they run (for the host; Triton has its own assembler for GPUs, so no nvcc).
# The others are how NCCL reaches InfiniBand and RoCE.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libibverbs1 librdmacm1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home pretrain
COPY --from=build /opt/pretrain /opt/pretrain
ENV PATH=/opt/pretrain/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/pretrain
ENTRYPOINT ["pretrain"]
CMD ["--help"]

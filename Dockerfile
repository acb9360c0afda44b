# Trainer and SGLang for GPU nodes: docker build -t megatron-vespo .
#
# The base is NVIDIA's PyTorch image of July 2026: Ubuntu 24.04, Python 3.12, CUDA 13.3, PyTorch 2.13.0a0, and Transformer
# Engine built for them. It needs driver 580 or newer (older data-centre drivers by CUDA's forward compatibility). Another
# one: --build-arg BASE=nvcr.io/nvidia/pytorch:26.08-py3
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

ARG SGLANG=0.5.23
ARG MEGATRON_CORE=0.19.2
ARG UV=0.13.9

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# SGLang pins another torch than the image's, so it lives in an environment of its own that sees none of the image's
# packages. The largest layer, and the one that changes least: it comes first.
COPY docker/constraints-sglang.txt /opt/build/
RUN python3 -m venv /opt/sglang \
    && PIP_CONSTRAINT='' /opt/sglang/bin/python -m pip install "uv==${UV}" \
    && /opt/sglang/bin/uv pip install --no-cache --compile-bytecode --python /opt/sglang/bin/python \
        --constraint /opt/build/constraints-sglang.txt "sglang==${SGLANG}"

# The trainer uses the image's torch, Transformer Engine and apex: whatever is built for CUDA keeps its version.
COPY tools/pin_image.py docker/requirements-trainer.txt /opt/build/
RUN python3 /opt/build/pin_image.py > /opt/build/constraints-image.txt \
    && PIP_CONSTRAINT=/opt/build/constraints-image.txt python3 -m pip install \
        --requirement /opt/build/requirements-trainer.txt \
    && PIP_CONSTRAINT='' python3 -m pip install --no-deps "megatron-core==${MEGATRON_CORE}"

# The package, for both: SGLang's workers import the part that verifies and applies weights.
WORKDIR /opt/megatron-vespo
COPY pyproject.toml setup.py LICENSE ./
COPY megatron_vespo megatron_vespo
COPY tools tools
COPY examples examples
RUN PIP_CONSTRAINT='' python3 -m pip install --no-deps --no-build-isolation --editable . \
    && /opt/sglang/bin/uv pip install --no-cache --python /opt/sglang/bin/python --no-deps --editable .

# Megatron's overlap needs kernels launched in order (before Blackwell).
ENV CUDA_DEVICE_MAX_CONNECTIONS=1

# Imports and versions; a build has no GPU. A run names the servers' interpreter: rollout.server.python=/opt/sglang/bin/python
RUN python3 tools/selftest.py --server-python /opt/sglang/bin/python --image-constraints /opt/build/constraints-image.txt \
        --transformer-engine

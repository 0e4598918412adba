# mmdet_norms in a container, for training and testing without installing anything:
#   docker build -t mmdet-norms .
#   docker run --rm -v "$PWD:/work" mmdet-norms mmdet-norms train CONFIG --data-root /work/DATA
# With CUDA, which PyPI's build of torch brings (run it with --gpus all and, for data loaders, --shm-size 8g):
#   docker build -t mmdet-norms:cuda --build-arg TORCH_INDEX= .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# The index that has the wanted build of torch beside PyPI: by default the one for CPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# gcc compiles the library with which BNET trains on a CPU; Debian's version of it is as good as any.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY requirements/constraints.txt requirements/
# torch first and by itself, so that a change of the package does not fetch it again
RUN pip install -c requirements/constraints.txt setuptools wheel && \
    pip install -c requirements/constraints.txt torch
COPY . .
# opencv-python needs libGL, which the image lacks; the headless build is the same module without it.
RUN pip install -c requirements/constraints.txt --no-build-isolation '.[lite,optim]' && \
    pip install -c requirements/constraints.txt --force-reinstall --no-deps opencv-python-headless

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 1000 user && install -d -o user /work
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH MPLBACKEND=Agg GOMP_SPINCOUNT=10000
USER 1000
WORKDIR /work
CMD ["mmdet-norms", "doctor"]

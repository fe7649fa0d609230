# The command line and the server on NVIDIA GPUs. From the checkout: docker build -f docker/cuda.Dockerfile -t debiformer:cuda .
# To be run with --gpus all: the driver comes from the host, CUDA with PyTorch's wheels.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.3.0 && python -m build --wheel --outdir /wheel

FROM python:3.11.14-slim-bookworm
ARG EXTRAS=train,explain,export,serve
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles the launchers of its kernels where they run. Debian keeps one version of its packages only: none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.15.0 torchvision==0.29.2
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir "$(echo /wheel/*.whl)[$EXTRAS]"
RUN useradd --create-home --uid 1000 debiformer
USER 1000
WORKDIR /home/debiformer
ENTRYPOINT ["debiformer"]
CMD ["--help"]

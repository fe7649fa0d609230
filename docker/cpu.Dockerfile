# The command line and the server on a CPU. From the checkout: docker build -f docker/cpu.Dockerfile -t debiformer:cpu .
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.3.0 && python -m build --wheel --outdir /wheel

FROM python:3.11.14-slim-bookworm
ARG EXTRAS=train,explain,export,serve
# PyTorch from its own index, before anything asks for it: the wheels of PyPI bring gigabytes for GPUs.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.15.0 torchvision==0.29.2
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir "$(echo /wheel/*.whl)[$EXTRAS]"
RUN useradd --create-home --uid 1000 debiformer
USER 1000
WORKDIR /home/debiformer
ENTRYPOINT ["debiformer"]
CMD ["--help"]

# lorasb server. CPU by default; for a GPU give another base image and torch index:
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 \
#                --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t lorasb:gpu .
# Run: docker run -p 127.0.0.1:8000:8000 -v $PWD/data:/data lorasb \
#        serve /data/model --basis /data/basis.safetensors --adapters /data/adapters --allow-open
# Every flag is also a variable (-e LORASB_MAX_QUEUE=200) or a key of a file (docs/configuration.md).
# Stop it with `docker stop -t 30`, so that running requests can end.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The CPU kernels are compiled when they are first needed. Images without Python (the CUDA ones) get
# Debian's or Ubuntu's own.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
        $(command -v python3 >/dev/null || echo python3 python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lorasb
ENV PATH=/opt/lorasb/bin:$PATH PIP_NO_CACHE_DIR=1
RUN pip install 'torch>=2.13,<2.14' --index-url ${TORCH_INDEX}

WORKDIR /src
COPY pyproject.toml README.md ./
COPY lorasb_runtime lorasb_runtime
COPY server server
COPY tools tools
RUN pip install '.[s3,otel]' && rm -rf /src/*

RUN useradd --create-home --uid 10001 lorasb
USER lorasb
WORKDIR /home/lorasb
# The container's own address is no loopback: this still needs LORASB_API_KEYS or LORASB_ALLOW_OPEN.
ENV LORASB_HOST=0.0.0.0 LORASB_PORT=8000
EXPOSE 8000
# Of a server without TLS on the port above; with TLS, or as another command, give --no-healthcheck.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD \
    python3 -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:$LORASB_PORT/ready')"
ENTRYPOINT ["lorasb"]
CMD ["--help"]

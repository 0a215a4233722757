# deltamerge for the CPU, or with another TORCH_INDEX for CUDA; no weights inside, the hub's cache is a volume.
#   docker build -t deltamerge .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v hub:/cache deltamerge run recipe.yaml
ARG PYTHON=3.12
FROM python:${PYTHON} AS build
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE /src/
COPY deltamerge /src/deltamerge
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.6'
RUN --mount=from=build,source=/wheels,target=/wheels pip install --no-cache-dir /wheels/*.whl && mkdir -m 1777 /cache
ENV HF_HOME=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["deltamerge"]

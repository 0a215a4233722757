# deltamerge on CPU, without weights: docker build -t deltamerge . && docker run --rm -v "$PWD:/work" -v hub:/cache deltamerge run recipe.yaml
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /src/
COPY deltamerge /src/deltamerge
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '/src[fast]' && rm -rf /src
ENV HF_HOME=/cache NUMBA_CACHE_DIR=/cache/numba
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["deltamerge"]

#!/usr/bin/env bash
# Build wheel and sdist, install each in a fresh environment with the newest and the lowest dependencies (of those that
# have wheels for this Python), start it as pipx does, and merge with it.
#   scripts/packaging.sh              with python3
#   PYTHON=python3.13 CONSTRAINTS=constraints.txt scripts/packaging.sh    # such as a torch without CUDA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet --disable-pip-version-check build uv
"$scratch/tools/bin/python" -m build --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }
ls -l "$scratch/dist"
ls "$scratch"/dist/*-cp311-abi3-*.whl >/dev/null || { echo "the wheel is not one for every Python"; exit 1; }

cat >"$scratch/models.py" <<'END'
import json, pathlib, sys
import numpy as np
from safetensors.numpy import save_file

rng = np.random.default_rng(0)
base = {f"layers.{i}.weight": rng.standard_normal((8, 8), dtype=np.float32) for i in range(2)}
for name, step in (("base", 0), ("a", 1e-2), ("b", -1e-2)):
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir(parents=True)
    save_file({k: v + np.float32(step) for k, v in base.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
END
"$scratch/tools/bin/pip" install --quiet --disable-pip-version-check numpy safetensors
"$scratch/tools/bin/python" "$scratch/models.py" "$scratch/models"

try() { # label, package, resolution of the dependencies that pyproject.toml names
    local env="$scratch/$1" install
    "$python" -m venv --without-pip "$env"
    install=("$scratch/tools/bin/uv" pip install --quiet --python "$env/bin/python" --constraint "${CONSTRAINTS:-/dev/null}"
        ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
    if [ "$3" = lowest-direct ]; then
        "${install[@]}" --resolution lowest-direct --only-binary :all: -r pyproject.toml
    fi
    "${install[@]}" "$2"
    (
        cd "$scratch/models"
        "$env/bin/deltamerge" init a b --base base --out "$1.yaml"
        "$env/bin/deltamerge" check "$1.yaml"
        "$env/bin/deltamerge" run "$1.yaml" --out "$1-merged" --quiet
        "$env/bin/deltamerge" verify "$1-merged"
        "$env/bin/deltamerge" run "$1.yaml" --out "$1-drawn" --pictures --quiet
        "$env/bin/deltamerge" inspect "$1-drawn" --base base --report "$1.html" >/dev/null
        "$env/bin/deltamerge" --version | tee "$1.version"
        grep -E '^kernels (baseline|avx2|avx512)$' "$1.version" >/dev/null || { echo "the kernels are not there"; exit 1; }
    )
    echo "$1: works"
}
wheel="$(echo "$scratch"/dist/*.whl)" sdist="$(echo "$scratch"/dist/*.tar.gz)"
try wheel-newest "$wheel" highest
try wheel-lowest "$wheel" lowest-direct
try sdist-newest "$sdist" highest
# without installing it: what pipx run and uvx do
"$scratch/tools/bin/uv" tool run --quiet --python "$python" --constraint "${CONSTRAINTS:-/dev/null}" --from "$wheel" deltamerge methods ties
# the same bytes, whatever is installed
sha256sum "$scratch"/models/*-merged/model.safetensors | cut -d' ' -f1 | uniq -c | { read -r count _; [ "$count" = 3 ]; }
echo "all three made the same bytes"

#!/usr/bin/env bash
# Install what `make dist` made, each file in a fresh environment, and use it: help, a merge, errors that name extras.
# The wheel is tried on every Python from 3.11 on that is here, the sdist and the wheel without kernels on the first. All
# make the same bytes. Then start it as uvx and pipx run do, without installing it.
#   scripts/packaging.sh
#   PYTHONS="3.11 3.13" CONSTRAINTS=constraints.txt LOWEST=1 scripts/packaging.sh
# CONSTRAINTS could ask for a torch without CUDA; LOWEST tries the lowest dependencies too, of those that have wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
one() { [ $# = 1 ] && [ -e "$1" ] && echo "$PWD/$1" || { echo "no dist/${1##*/}: make dist" >&2; exit 1; }; }
wheel="$(one dist/*-cp311-abi3-*.whl)" pure="$(one dist/*-py3-none-any.whl)" sdist="$(one dist/*.tar.gz)"

"${PYTHON:-python3}" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet --disable-pip-version-check uv numpy safetensors
export UV_PYTHON_DOWNLOADS=never UV_LINK_MODE="${UV_LINK_MODE:-hardlink}"
uv="$scratch/tools/bin/uv"
pythons=()
for python in ${PYTHONS:-3.11 3.12 3.13 3.14}; do
    if "$uv" python find --quiet "$python" >/dev/null 2>&1; then pythons+=("$python"); else echo "Python $python is not here"; fi
done
[ "${#pythons[@]}" -gt 0 ] || { echo "no Python from 3.11 on" >&2; exit 1; }

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
"$scratch/tools/bin/python" "$scratch/models.py" "$scratch/models"

uses() { # label: use the deltamerge of that environment
    local dm="$scratch/$1/bin/deltamerge"
    refuses() { # extra, command
        local extra="$1"
        shift
        if "$dm" "$@" >"$scratch/said" 2>&1 || ! grep -qF "pip install 'deltamerge[$extra]'" "$scratch/said"; then
            cat "$scratch/said" >&2
            echo "deltamerge $*: does not name the extra $extra" >&2
            return 1
        fi
    }
    cd "$scratch/models"
    "$dm" --help >"$scratch/said"
    grep -q 'run  *Merge' "$scratch/said"
    "$dm" --version
    "$dm" init a b --base base --out "$1.yaml"
    "$dm" check "$1.yaml"
    "$dm" run "$1.yaml" --out "$1-merged" --quiet
    "$dm" verify "$1-merged"
    "$dm" run "$1.yaml" --out "$1-drawn" --pictures --quiet
    "$dm" inspect "$1-drawn" --base base --report "$1.html" >/dev/null
    refuses gguf convert base "$1-gguf" --gguf q8_0
    refuses ray run "$1.yaml" --out "$1-ray" --ray
    "$dm" doctor | tee "$1.doctor"
}
try() { # label, Python, package, resolution, kernels
    local install=("$uv" pip install --quiet --python "$scratch/$1" --constraint "${CONSTRAINTS:-/dev/null}"
        ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
    "$uv" venv --quiet --python "$2" "$scratch/$1"
    if [ "$4" = lowest-direct ]; then
        "${install[@]}" --resolution lowest-direct --only-binary :all: -r pyproject.toml
    fi
    "${install[@]}" "$3"
    (uses "$1")
    grep -qE "^kernels $5" "$scratch/models/$1.doctor" || { echo "$1: the kernels are not $5" >&2; exit 1; }
    rm -rf "${scratch:?}/$1"
    echo "$1: works"
}
compiled='(baseline|avx2|avx512)$'
for python in "${pythons[@]}"; do try "wheel-${python//[^0-9.]/}" "$python" "$wheel" highest "$compiled"; done
if [ -n "${LOWEST:-}" ]; then try wheel-lowest "${pythons[0]}" "$wheel" lowest-direct "$compiled"; fi
try sdist "${pythons[0]}" "$sdist" highest "$compiled"
try pure "${pythons[0]}" "$pure" highest 'not compiled'
"$uv" tool run --quiet --python "${pythons[0]}" --constraint "${CONSTRAINTS:-/dev/null}" \
    ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} --from "$wheel" deltamerge methods ties
sums="$(sha256sum "$scratch"/models/*-merged/model.safetensors | cut -d' ' -f1 | sort -u)"
[ "$(wc -l <<<"$sums")" = 1 ] || { echo "different bytes: $sums" >&2; exit 1; }
echo "all made the same bytes; uvx works"

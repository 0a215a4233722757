#!/usr/bin/env bash
# Everything a change must pass. `make check` runs it in .venv; any environment with the `dev` extra will do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONDONTWRITEBYTECODE=  # tests start hundreds of Pythons, which need not compile the same files each

set -x
ruff check .
ruff format --check .
mypy --strict deltamerge
lint-imports
OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal

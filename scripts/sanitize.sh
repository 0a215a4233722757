#!/bin/sh
# Build the compiled kernels with AddressSanitizer and UndefinedBehaviorSanitizer into .sanitize, and run with them the
# tests of kernels and the fuzz targets of the readers that use them. PYTHON names an interpreter that has the dev extras.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
CHECKS="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
DELTAMERGE_FLAGS="$CHECKS" "$PYTHON" setup.py -q build --build-base .sanitize/build --build-lib .sanitize/lib
ls .sanitize/lib/deltamerge/engine/kernels/_native*.so >/dev/null
TESTS="${*:-tests/engine/test_misuse.py tests/engine/test_kernels.py tests/engine/test_stream.py \
  tests/formats/test_quantised_values.py tests/formats/test_packed.py tests/formats/test_positions.py tests/formats/test_steps.py \
  tests/models/test_file.py tests/project/test_fuzz.py}"
# The kernels are those of .sanitize/lib, not of this folder; Python itself leaks on purpose.
# shellcheck disable=SC2086
exec env PYTHONSAFEPATH=1 PYTHONPATH="$PWD/.sanitize/lib:$PWD/tests" OMP_NUM_THREADS=1 DELTAMERGE_SANITIZED=1 \
  LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS="detect_leaks=0:log_path=$PWD/.sanitize/report:allocator_may_return_null=1:handle_segv=1" UBSAN_OPTIONS="print_stacktrace=1:log_path=$PWD/.sanitize/report" \
  "$PYTHON" -m pytest -q -p no:cacheprovider -p no:faulthandler $TESTS

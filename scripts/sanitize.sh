#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The native kernels under the address and undefined-behaviour sanitizers: builds them so in a
# folder of its own and runs their tests. Usage: scripts/sanitize.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
source=fla/ops/engine/native/src
flags="-std=c++17 -O1 -g -fPIC -fno-math-errno -ffp-contract=fast -Wno-psabi
  -fsanitize=address,undefined -fno-sanitize-recover=all"
objects=""
compile() {  # name, flags of the instruction set
  # shellcheck disable=SC2086
  c++ $flags "${@:2}" "-DFLA_ISA=$1" -c "$source/kernels.cpp" -o "$folder/$1.o"
  objects="$objects $folder/$1.o"
}
compile baseline
if [ "$(uname -m)" = x86_64 ]; then
  compile avx2 -mavx2 -mfma
  compile avx512 -march=x86-64-v4 -mprefer-vector-width=512
fi
# shellcheck disable=SC2086
c++ $flags -shared "$source/api.cpp" $objects -o "$folder/library.so" -lpthread -ldl
# leaks: Python's own; the tests that start processes of their own take the usual library
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 FLA_NATIVE_LIBRARY="$folder/library.so"
"$python" -m pytest -q -p no:cacheprovider tests/ops/test_native.py tests/modules/test_native.py -k \
  "family or instruction_set or shape_and_layout or boundaries or any_shape or lower or threads or scan or short"
"$python" -m tests.fuzz --every 4

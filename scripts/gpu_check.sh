#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What to run on a machine with a GPU: the Triton kernels' tests on the device, then the figures,
# within 8 minutes. A part that fails is reported, and the rest goes on; exits with 1 if one did.
# Usage: scripts/gpu_check.sh [OUT [WHEEL...]]   OUT: folder of the results; WHEELs: another package
# called fla, and what it needs, for comparison.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
shift || true
python="${PYTHON:-python3}"
status=0
mkdir -p "$out"
unset TRITON_INTERPRET
"$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' ||
  { echo "gpu_check: torch, Triton and a GPU are needed" >&2; exit 2; }

timeout 180 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_triton.py \
  tests/modules/test_triton.py tests/modules/test_divergence.py 2>&1 |
  tee "$out/gpu-tests.log" | tail -n 40 || { echo "gpu_check: tests failed" >&2; status=1; }

peer=()
if [ "$#" -gt 0 ]; then
  folder="$(mktemp -d)"
  "$python" -m pip install -q --no-index --no-deps --target "$folder" "$@" && peer=(--peer "$folder")
fi
timeout 60 "$python" -m benchmarks.modules --device cuda --repeats 5 --out "$out" ||
  { echo "gpu_check: the modules' figures failed" >&2; status=1; }
timeout 220 "$python" -m benchmarks.gpu --out "$out" "${peer[@]}" ||
  { echo "gpu_check: figures failed" >&2; status=1; }
exit "$status"

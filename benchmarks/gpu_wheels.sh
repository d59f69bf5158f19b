#!/usr/bin/env bash
# Downloads the wheels that make bench needs besides torch, transformers, Pillow, numpy and scipy, for a Linux machine without a network.
# usage: benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]      PYTHON_VERSION: of that machine, default 3.12
set -euo pipefail
folder=${1:?usage: benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]}
python_version=${2:-3.12}
here=$(cd "$(dirname "$0")/.." && pwd)
there='torch|triton|nvidia-cu.*|nvidia-nv.*|nvidia-nccl.*|cuda-.*|transformers|pillow|numpy|scipy|accelerate|huggingface-hub|hf-xet|tokenizers|safetensors|sympy|networkx'

wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
grep -Ev "^($there)==" "$here/requirements-runtime.lock" | grep -E '^[A-Za-z]' > "$wanted"
# The clients of the benchmark.
grep -E '^(httpx|httpcore|h11|anyio|psutil)==' "$here/requirements.lock" >> "$wanted"
sort -u -o "$wanted" "$wanted"

platforms=()
for glibc in 5 12 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
  "${platforms[@]}" --platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64 --platform any \
  --dest "$folder" --requirement "$wanted"
du -sh "$folder"

#!/usr/bin/env bash
# The GPU tables: Stable Diffusion 1.4's size with random weights at 512x512, in calls of under ten minutes each.
# usage: benchmarks/gpu.sh CALL [WHEELS]     CALL: fp16-steps fp16-closed fp16-mixed fp16-short fp32-steps fp32-closed fp32-mixed fp32-short
# WHEELS: the folder of gpu_wheels.sh, for a machine without a network. Tables go to $OUT, or to benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
call=${1:?$(sed -n '2,4p' "$0")}
precision=${call%%-*}
model=${MODEL:-/tmp/full-size}
side=${SIDE:-512}
steps=${STEPS:-50}

if [ $# -gt 1 ]; then
  site=/tmp/stable-diffusion-site
  [ -d "$site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$2"/*.whl
  export PYTHONPATH="$site:$PWD" PATH="$site/bin:$PATH"
fi
[ -f "$model/model_index.json" ] || python3 -c "from pathlib import Path; from benchmarks.full_size import make; make(Path('$model'))"

bench() {
  python3 -m benchmarks.run --model "$model" --precision "$precision" --side "$side" --steps "$steps" --rounds 2 \
    --output "${OUT:-benchmarks/results}" --name "$call$1" "${@:2}"
}
contenders=(plain engine http batching)
graphs=(--cuda-graphs)
if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  contenders+=(graphs)
else
  echo "No GPU: without CUDA graphs." >&2
  graphs=()
fi
case $call in
  *-steps)
    bench "" --parts steps --jobs ${JOBS:-1 2 4 8 16 32}
    if [ ${#graphs[@]} -gt 0 ]; then bench -graphs --parts steps --jobs ${JOBS:-1 2 4 8 16} "${graphs[@]}"; fi ;;
  *-closed) bench "" --parts closed --requests-per-client 1 --contenders "${contenders[@]}" ;;
  *-mixed) bench "" --parts mixed open --requests 16 --contenders "${contenders[@]}" ;;
  *-short) bench "" --parts short --short-every-s 0.5 --contenders "${contenders[@]}" ;;
  *) sed -n '2,4p' "$0" >&2; exit 2 ;;
esac

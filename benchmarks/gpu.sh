#!/usr/bin/env bash
# The GPU tables: Stable Diffusion 1.4's size with random weights at 512x512, in calls of under ten minutes each.
# usage: benchmarks/gpu.sh PRECISION-PART [WHEELS]
#   PRECISION: fp16 or fp32      PART: steps, closed, crowd, mixed, open, short
#   WHEELS: the folder of gpu_wheels.sh, for a machine without a network. Tables go to $OUT, or to benchmarks/results.
set -euo pipefail
wheels=${2:+$(realpath "$2")}
cd "$(dirname "$(realpath "$0")")/.."
usage() { sed -n '2,5p' benchmarks/gpu.sh >&2; exit 2; }
[ $# -ge 1 ] || usage
call=$1
precision=${call%%-*}
model=${MODEL:-/tmp/full-size}
side=${SIDE:-512}
steps=${STEPS:-50}

if [ -n "$wheels" ]; then
  site=/tmp/stable-diffusion-site
  if [ ! -d "$site" ]; then
    rm -rf "$site.part"
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site.part" "$wheels"/*.whl
    mv "$site.part" "$site"
  fi
  export PYTHONPATH="$site:$PWD"
fi
cuda=$(python3 -c "import torch; print(int(torch.cuda.is_available()))")
[ "$cuda" = 1 ] || echo "No GPU: without CUDA graphs." >&2
[ -f "$model/model_index.json" ] || python3 -c "from pathlib import Path; from benchmarks.full_size import make; make(Path('$model'))"

bench() {
  python3 -m benchmarks.run --model "$model" --precision "$precision" --side "$side" --steps "$steps" \
    --output "${OUT:-benchmarks/results}" "$@"
}
contenders=(plain engine http batching)
[ "$cuda" = 0 ] || contenders=(plain engine graphs http batching)
# Single precision takes twice as long.
rounds=2
[ "$precision" = fp16 ] || rounds=1
case $call in
  fp16-steps | fp32-steps)
    bench --name "$call" --parts steps --jobs ${JOBS:-1 2 4 8 16 32}
    [ "$cuda" = 0 ] || bench --name "$call-graphs" --parts steps --jobs 1 2 4 8 10 --cuda-graphs
    ;;
  fp16-closed | fp32-closed) bench --name "$call" --parts closed --clients 1 4 --rounds "$rounds" --contenders "${contenders[@]}" ;;
  fp16-crowd | fp32-crowd)
    bench --name "$call" --parts closed --clients 8 16 --requests-per-client 1 --rounds "$rounds" --contenders "${contenders[@]}"
    ;;
  fp16-mixed | fp32-mixed) bench --name "$call" --parts mixed --rounds "$rounds" --contenders "${contenders[@]}" ;;
  fp16-open | fp32-open) bench --name "$call" --parts open --requests 20 --rounds 1 --contenders "${contenders[@]}" ;;
  fp16-short | fp32-short) bench --name "$call" --parts short --short-every-s 0.5 --rounds "$rounds" --contenders "${contenders[@]}" ;;
  *) usage ;;
esac

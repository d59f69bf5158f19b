#!/usr/bin/env bash
# Runs the proofs against diffusers and then the benchmarks on a GPU: first (under nine minutes on a bare machine), then second (five).
# usage: benchmarks/gpu.sh all|first|second|PART... [OPTION...]      an unknown PART lists all of them
#   WHEELS: the folder of gpu_wheels.sh, for a machine that has torch but no network
#   OUT: the folder of gpu.json, gpu.md and gpu.log, by default benchmarks/results
#   OPTIONs go to python3 -m benchmarks.gpu: --budget-s, --clock, --model, --side, --steps
set -euo pipefail
wheels=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$(realpath "$0")")/.."
[ $# -ge 1 ] || { sed -n '2,6p' benchmarks/gpu.sh >&2; exit 2; }

if [ -n "$wheels" ]; then
  site=/tmp/stable-diffusion-site
  if [ ! -d "$site" ]; then
    rm -rf "$site.part"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site.part" "$wheels"/*.whl
    mv "$site.part" "$site"
  fi
  export PYTHONPATH="$site:$PWD"
fi
export BENTOML_DO_NOT_TRACK=True HF_HUB_OFFLINE=1 PYTHONWARNINGS="ignore:pkg_resources is deprecated:UserWarning"
exec python3 -m benchmarks.gpu "$@" --output "${OUT:-benchmarks/results}"

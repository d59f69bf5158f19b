"""Proofs against diffusers and benchmark tables on a rented GPU, within a time budget. `benchmarks/gpu.sh` starts it."""

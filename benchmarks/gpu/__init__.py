"""A rented GPU's minutes: proofs against diffusers first, then the tables, planned by the clock. `benchmarks/gpu.sh` starts it."""

"""Denoising of many jobs at once, step by step. Knows nothing of BentoML or HTTP."""

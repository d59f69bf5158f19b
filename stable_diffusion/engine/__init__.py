"""Denoising of many jobs at once, step by step. Independent of BentoML, HTTP and the job store."""

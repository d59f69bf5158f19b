"""The limits of requests: sides, steps, prompts, LoRAs. All processes know them; `requests.py` holds requests against them."""

from __future__ import annotations

MIN_SIDE = 64
USUAL_MAX_SIDE = 1024
MAX_SIDE = 2048  # of models for large images (models/folder.py)
SIDE_MULTIPLE = 8
MAX_STEPS = 150
MAX_GUIDANCE_SCALE = 30.0
MAX_PROMPT_CHARACTERS = 2000
MAX_PROMPT_CHUNKS = 6  # of 75 tokens, in each prompt
MAX_PARTS = 4  # of a prompt, joined with AND; each costs as much as half an image
MAX_TEXTS = 32  # different texts of a prompt that changes with the steps; each is encoded
MAX_CLIP_SKIP = 12
MAX_LORAS = 8
MAX_LORA_BYTES = 2**30  # of all LoRAs of a request, as float32; the model process keeps no more on the device
MAX_LORA_WEIGHT = 10.0
MAX_IMAGES = 10  # per request, in APIs that generate several images
# Per request: pixels x steps, summed over its images, for a native size of 512x512. Allows ten such images in 150 steps, but not three of
# 1024x1024.
MAX_PIXEL_STEPS = 400_000_000
SEED_LIMIT = 2**32  # every client's language represents such a number exactly

"""OpenAI's images API."""

from stable_diffusion.api.openai.responses import ERROR, PREFIXES, refusal
from stable_diffusion.api.openai.routes import make_routes

__all__ = ["ERROR", "PREFIXES", "refusal", "make_routes"]

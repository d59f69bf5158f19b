"""OpenAI's images API."""

from stable_diffusion.api.openai.routes import PREFIXES, make_routes, refusal

__all__ = ["PREFIXES", "refusal", "make_routes"]

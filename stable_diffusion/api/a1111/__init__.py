"""A1111's API, as far as its clients use it."""

from stable_diffusion.api.a1111.responses import ERROR, PREFIXES, refusal
from stable_diffusion.api.a1111.routes import make_routes

__all__ = ["ERROR", "PREFIXES", "refusal", "make_routes"]

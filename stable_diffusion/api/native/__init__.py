"""The native API: /txt2img, /img2img and /inpaint."""

from stable_diffusion.api.native.routes import make_routes

__all__ = ["make_routes"]

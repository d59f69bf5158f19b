"""/reproduce: generates an image again from what its file says."""

from stable_diffusion.api.reproduce.routes import make_routes

__all__ = ["make_routes"]

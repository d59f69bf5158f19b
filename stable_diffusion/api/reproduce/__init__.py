"""/reproduce: an image is generated again from what its file says."""

from stable_diffusion.api.reproduce.routes import make_routes

__all__ = ["make_routes"]

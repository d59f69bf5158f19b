"""/jobs: jobs by their ids."""

from stable_diffusion.api.jobs.routes import make_routes

__all__ = ["make_routes"]

"""/status and /capabilities, and the pages /readyz and /metrics."""

from stable_diffusion.api.status.routes import make_routes, metrics_page, readiness_page

__all__ = ["make_routes", "metrics_page", "readiness_page"]

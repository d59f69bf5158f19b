"""/status and /capabilities, and the pages /readyz and /metrics."""

from stable_diffusion.api.status.routes import make_routes, readiness_page, show_metrics

__all__ = ["readiness_page", "make_routes", "show_metrics"]

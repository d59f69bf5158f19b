"""Stable Diffusion as a service. Importing this package imports neither torch nor diffusers."""

__version__ = "1.0.0"

"""Stable Diffusion as a service. Importing this package loads neither torch nor diffusers."""

__version__ = "1.0.0"

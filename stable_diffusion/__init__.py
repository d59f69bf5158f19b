"""Stable Diffusion as a service. Importing this package loads neither torch nor diffusers."""

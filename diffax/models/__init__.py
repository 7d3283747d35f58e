"""Models: networks and diffusion together."""

"""Models: networks and diffusion together, behind one small protocol (see `diffax.models.base`)."""

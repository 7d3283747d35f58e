"""The mathematics of diffusion; it needs JAX and NumPy alone."""

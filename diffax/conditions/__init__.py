"""Conditions: what a model is told besides its noise level."""

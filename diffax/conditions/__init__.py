"""Conditions: what a model depends on besides its noise level."""

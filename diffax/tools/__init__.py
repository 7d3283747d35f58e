"""Tools beside the main command."""

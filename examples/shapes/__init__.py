"""A small world of captioned, coloured shapes."""

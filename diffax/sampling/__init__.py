"""From trained parameters to pictures."""

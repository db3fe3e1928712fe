"""Peers of MS: what else could draft for the same primary, compact, for comparison on equal tokens. None is served."""

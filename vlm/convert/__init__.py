"""Models that people already have: read from their layouts, and written so that the rest of the world loads them."""

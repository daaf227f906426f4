"""How cache entries are stored, one file per number format."""

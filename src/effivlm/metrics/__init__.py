"""Pure functions from records to numbers with intervals."""

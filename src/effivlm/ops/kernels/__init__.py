"""Fast twins of functions in `ops`, in Triton."""

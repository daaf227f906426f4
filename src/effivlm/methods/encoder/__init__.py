"""Methods that reduce tokens inside the vision encoder."""

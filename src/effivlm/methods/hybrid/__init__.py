"""Methods with several stages, one file each."""

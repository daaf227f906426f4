"""Questions with images, and how answers are scored."""

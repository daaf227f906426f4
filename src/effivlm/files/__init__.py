"""What is read from and written to disk passes here: one reader per kind of file, each of which
turns every failure into the caller's error with file, place, what was expected and what came.
"""

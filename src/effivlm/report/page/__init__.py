"""The page that people open first: one file without network or server, or a folder for large
runs.
"""

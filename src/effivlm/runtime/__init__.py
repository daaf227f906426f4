"""Applies what methods decide to a running transformers model; the only code that knows its
internals.
"""

"""Model families as data: one file describes where a transformers model keeps what; none knows a
method.
"""

"""Trains the zoo from scratch on pictures it renders: language, then vision, then both together.
Never part of tests or demo.

1. `language`: the language model answers questions from *labels*, the sum of the words that a token
shows (`labels.py`); no
   picture is rendered. One-word answers about pixels alone teach almost nothing: the signal is too
   thin.
2. `vision`: encoder and projector learn to yield those sums.
3. `joint`: everything on answers, with the labels as a second loss.

Word embeddings are random and fixed in 1 and 2, so that both can run at the same time, and a
language model fits every encoder.
"""

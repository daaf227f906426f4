"""The masked twin of the contract, under the name that tests use."""

from effivlm.contract.twin import STEPS, Watched, close, kept_masks, masked, run

__all__ = ["STEPS", "Watched", "close", "kept_masks", "masked", "run"]

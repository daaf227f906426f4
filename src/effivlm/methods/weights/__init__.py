"""Methods that compress the weights of the language model."""

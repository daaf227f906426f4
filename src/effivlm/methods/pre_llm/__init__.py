"""Methods that choose and merge visual tokens between encoder and LLM."""

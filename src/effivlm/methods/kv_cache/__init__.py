"""Methods that compress the KV cache after prefill."""

"""Speed and memory: stages timed apart, baseline interleaved, beside the hardware's limit."""

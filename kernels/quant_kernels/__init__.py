"""Numbers and ops of 4-bit weights by 8-bit activations: one contract each, several backends."""

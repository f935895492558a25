"""How a checkpoint runs: load it, keep a KV cache, generate."""

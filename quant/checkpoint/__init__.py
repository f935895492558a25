"""How checkpoints are found, read and written."""

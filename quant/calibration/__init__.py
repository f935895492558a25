"""How the numbers of a checkpoint are chosen: one pass a file."""

"""How accurate a checkpoint is."""

"""Checkpoints: safe reading, model loading, key renaming, merging and inspection."""

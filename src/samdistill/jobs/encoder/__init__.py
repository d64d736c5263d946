"""Encoder distillation: a small trunk learns the image embedding of SAM 3."""

"""Encoder distillation: a small trunk learns the image embedding of a SAM."""

"""Video distillation: a detector learns to remember and to follow objects."""

"""Video distillation: a detector gets a memory and learns to follow objects."""

"""Detection distillation: EfficientSam3 learns SAM 3's answers to questions, and its features."""

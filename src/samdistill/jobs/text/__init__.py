"""Text distillation: a small text encoder learns the tokens that SAM 3's heads read."""

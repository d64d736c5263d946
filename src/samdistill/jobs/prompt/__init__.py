"""Prompt distillation: a MobileSAM is fine-tuned on masks while several teachers answer the same prompts."""

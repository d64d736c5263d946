"""Prompt distillation: a MobileSAM is fine-tuned on masks and on the signals of several teachers."""

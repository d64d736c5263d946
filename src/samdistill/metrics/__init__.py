"""Metrics: pure functions and small accumulators, usable during training and after it."""

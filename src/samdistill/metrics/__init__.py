"""Metrics: pure functions and small accumulators for use during and after training."""

"""Checkpoints: read safely (``files``), translate (``rename``), merge a student in (``merge``), ``inspect``."""

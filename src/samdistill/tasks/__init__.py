"""What is distilled: a task builds a student and turns batches into named, weighted loss terms."""

from .base import Task

__all__ = ["Task"]

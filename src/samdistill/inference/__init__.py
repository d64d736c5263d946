"""Inference on images and videos: prompts (points, boxes, phrases) to masks."""

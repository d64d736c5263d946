"""A model, an image, prompts in; masks out."""

"""Run exported ONNX files with NumPy, Pillow and onnxruntime alone.

``standalone.py`` joins the modules of this package to the ``predict.py`` of an export, so they import nothing but each
other, ``ops.sights`` and these three libraries.
"""

from .files import ModelError, Network
from .images import Canvas, open_image, runs
from .model import SINGLE, Model, canvas_of
from .phrases import Tokenizer, Vocabulary

__all__ = [
    "SINGLE",
    "Canvas",
    "Model",
    "ModelError",
    "Network",
    "Tokenizer",
    "Vocabulary",
    "canvas_of",
    "open_image",
    "runs",
]

"""The package's own export targets. Importing this module registers them."""

from . import coreml, executorch, litert, onnx, openvino

__all__ = ["coreml", "executorch", "litert", "onnx", "openvino"]

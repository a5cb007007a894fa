"""Export: a float model and a precision recipe -> ONNX graphs -> one bundle, measured against the model."""

from .pipeline import export_bundle

__all__ = ["export_bundle"]

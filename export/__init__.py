"""Export: a float model and a precision recipe -> ONNX graphs -> one bundle, measured against the model.

`export_bundle` needs torch; modules that only read a bundle (the `tensorrt_*` ones) are imported without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import export_bundle

__all__ = ["export_bundle"]


def __getattr__(name: str) -> Any:
    if name != "export_bundle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline import export_bundle

    return export_bundle

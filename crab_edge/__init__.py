"""Crab Edge: Crab+ audio-visual language models with unmerged, router-mixed LoRA on small machines.

    import crab_edge

    model = crab_edge.load()
    session = model.open("clip.mp4")
    print(session.ask("Is there a dog?"))

Importing this package is cheap: numpy, the media libraries and the engine are imported by `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crab_edge.session import Model, Session, load

__version__ = "0.1.0"
__all__ = ["Model", "Session", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "Session", "load"):
        from crab_edge import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""One tiny exported bundle for all rooms of a test run: exporting it takes some seconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def shared_tiny_bundle() -> Path:
    """A real bundle (random weights, exact products). Copy it before changing anything."""
    from tests.tiny_model import make_tiny_bundle

    folder = Path(tempfile.mkdtemp(prefix="crab-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_tiny_bundle(folder)

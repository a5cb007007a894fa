"""Engines run a bundle's graphs. One engine is one module here, named after the package that it needs.

A module has `create(bundle, *, threads=None) -> Engine` and imports its package inside it. There is no list
to edit and no fallback: an engine that can't run says so.

An engine that runs in several ways has them behind a colon, `onnxruntime:cuda` or `tensorrt:rtx`; its module
names the option of `create` that they go to in `VARIANT`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from crab_edge.errors import DependencyError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle

    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]

AUTO = "onnxruntime"
INSTALL = {
    "onnxruntime": "pip install 'crab-edge[cpu]'",
    "tensorrt": "pip install 'crab-edge[tensorrt]'",
    "torch": "pip install 'crab-edge[cuda]'",
}
ALTERNATIVES = {"tensorrt": {"tensorrt_rtx": "pip install 'crab-edge[rtx]'"}}
"""Packages that will do in place of the one that an engine is called after, and how to install them."""


class Engine(Protocol):
    """What a session needs of an engine. Batch 1; one KV cache, which belongs to the engine.

    An engine whose cache can't grow to the model's positions has `capacity: int`, the tokens that it holds.
    """

    name: str
    length: int
    """Tokens in the KV cache."""

    def vision(self, pixel_values: Floats) -> Floats:
        """Patches float32 [T*256, 1176] -> embeddings float32 [T*64, H]."""

    def audio(self, chunks: Floats, lengths: Integers) -> Floats:
        """Mel chunks float32 [C, n_mels, 200], valid frames int64 [C] -> embeddings float32 [n, H]."""

    def forward(self, embeds: Floats, position_ids: Integers) -> Floats:
        """Appends float32 [1, S, H] at position_ids int64 [3, 1, S]; logits float32 [V] of the last token.

        Raises EngineError when the cache would outgrow the model's positions.
        """

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens of the cache (0 <= length <= self.length)."""

    def describe(self) -> dict[str, Any]:
        """Name, provider and versions, as plain JSON values."""


@runtime_checkable
class Warmable(Protocol):
    """An engine that can open its graphs in the background, while the media are still being decoded."""

    def warm(self, *, vision: bool = True, audio: bool = True) -> None:
        """Starts opening the decoder and the towers named, and returns. Errors come with the first use."""


class Tracer(Protocol):
    """Teacher-forced passes through the decoder that give the weights of its routers, one after another.

    `layers` are the module paths of the linears that the routers belong to.
    """

    layers: tuple[str, ...]

    def __call__(self, embeds: Floats, position_ids: Integers) -> Floats:
        """Embeddings float32 [S, H] at position_ids int64 [3, S] -> weights float32 [layers, S, experts].

        A call is a pass from position 0 on, whatever was traced before; the arrays aren't changed later.
        """

    def close(self) -> None:
        """Frees what the tracer holds."""


@runtime_checkable
class Traceable(Protocol):
    """An engine that can read back the routers' weights."""

    def tracer(self) -> Tracer:
        """A new tracer; it has a cache of its own, so that the engine's cache and answers stay as they are.

        InputError when the decoder has no router, EngineError when memory is too short to trace.
        """


def names() -> list[str]:
    """All engines there are, installed or not."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def available() -> list[str]:
    """The engines whose package is installed here."""
    return [name for name in names() if _installed(name)]


def _installed(name: str) -> bool:
    packages = (name, *ALTERNATIVES.get(name, ()))
    return any(importlib.util.find_spec(package) is not None for package in packages)


def create(name: str, bundle: Bundle, *, threads: int | None = None, **options: Any) -> Engine:
    """Opens the engine `name` on a bundle; "auto" is ONNX Runtime on the CPU. `options` are the engine's own.

    `name:variant` sets the option that the engine's variants go to. Raises InputError for a name that isn't
    there, a variant given twice or threads < 1, DependencyError when the engine's package isn't installed,
    EngineError when it can't run the bundle.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads: expected 1 or more, got {threads}")
    name, colon, variant = name.partition(":")
    name = AUTO if name == "auto" and not colon else name
    if name not in names():
        raise InputError(f"unknown engine {name!r}; choose one of: auto, {', '.join(names())}")
    if not _installed(name):
        others = ALTERNATIVES.get(name, {}).items()
        raise DependencyError(
            f"engine {name} needs the package {name}; run `{INSTALL.get(name, 'pip install ' + name)}`"
            + "".join(f", or `{way}` for {package}" for package, way in others)
        )
    module = importlib.import_module(f"{__name__}.{name}")
    if colon:
        option = getattr(module, "VARIANT", None)
        if option is None or not variant:
            raise InputError(f"engine {name}:{variant}: {name} has no such variant; use --engine {name}")
        if options.get(option, variant) != variant:
            raise InputError(f"engine {name}:{variant} and {option}={options[option]!r} differ; give one")
        options[option] = variant
    known = inspect.signature(module.create).parameters
    foreign = next((option for option in options if option not in known), None)
    if foreign is not None:
        raise InputError(f"engine {name} has no option {foreign}; leave it out, or choose another engine")
    engine: Engine = module.create(bundle, threads=threads, **options)
    return engine

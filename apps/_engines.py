"""`crab-edge export --target`: engines made from a bundle, or from a model by way of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge.errors import CrabError, DependencyError, InputError

if TYPE_CHECKING:
    from crab_edge_export.tensorrt_engines import EngineOptions

Export = Callable[[Path], Path]


def options(
    targets: list[str] | None, capacity: int | None, workspace: int | None, int4: str | None
) -> EngineOptions | None:
    """What --target and its companions ask for; None without --target.

    Raises InputError for values that can't be, and for companions without --target.
    """
    given = {"--capacity": capacity, "--workspace": workspace, "--int4": int4}
    if not targets:
        alone = [name for name, value in given.items() if value is not None]
        if alone:
            raise InputError(f"{alone[0]} goes with --target, which isn't given")
        return None
    if int4 not in (None, "dequantize", "plugin"):
        raise InputError(f"--int4: expected dequantize or plugin, got {int4!r}")
    if workspace is not None and workspace < 1:
        raise InputError(f"--workspace: expected 1 MB or more, got {workspace}")
    engines = _engines()
    return engines.EngineOptions(
        tuple(targets),
        engines.CAPACITY if capacity is None else capacity,
        engines.WORKSPACE if workspace is None else workspace << 20,
        int4,
    )


def check(wanted: EngineOptions, shape: Any, recipe: Any, out: Path, overwrite: bool) -> None:
    """Raises InputError for what would end an export with engines after its hours of work."""
    from crab_edge.bundle import BundleWriter

    BundleWriter(out, overwrite).check_place()
    _engines().check_targets(wanted, recipe, shape)


def add(bundle: Path, out: Path, wanted: EngineOptions, *, overwrite: bool) -> Path:
    """Publishes `out`, the bundle with engines; estimates and what is left to do go to stderr."""
    from crab_edge_apps._progress import with_progress
    from rich.console import Console

    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    return with_progress(
        lambda progress: _engines().add_engines(
            bundle, out, wanted, overwrite=overwrite, progress=progress, report=say
        ),
        "checking the bundle",
    )


def export_and_add(export: Export, out: Path, wanted: EngineOptions, *, overwrite: bool) -> Path:
    """Exports a bundle beside `out`, then adds the engines; if that fails, the bundle stays there."""
    out = out.expanduser().absolute()
    plain = export(out.with_name(f".{out.name}.plain"))
    try:
        path = add(plain, out, wanted, overwrite=overwrite)
    except CrabError as error:
        again = " ".join(f"--target {name}" for name in wanted.targets)
        raise type(error)(
            f"{error}; the bundle is kept, go on with `crab-edge export --bundle {plain} {again} --out {out}`"
        ) from error
    shutil.rmtree(plain)
    return path


def lines(path: Path) -> list[str]:
    """What a bundle's engines are, one line a target."""
    from crab_edge.manifest import read_manifest

    manifest = read_manifest(path)
    found = []
    for name, engine in manifest.engines.items():
        graphs = tuple(graph.file for graph in engine.graphs.values())
        size = sum(info.size for file, info in manifest.files.items() if file.startswith(graphs))
        what = f"{engine.library} {engine.version}" if engine.built else "to be built"
        machines = ", ".join(f"sm_{sm}" for sm in engine.sm)
        found.append(
            f"engines for {name}: {what}, {machines}, {size / 1e6:.1f} MB, cache of {engine.capacity} tokens"
        )
    return found


def _engines() -> Any:
    try:
        from crab_edge_export import tensorrt_engines
    except ImportError as error:
        raise DependencyError(
            f"making engines needs the package {error.name}; run `pip install 'crab-edge[rtx]'`"
        ) from error
    return tensorrt_engines

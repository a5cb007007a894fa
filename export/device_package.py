"""Engines that can't be built on this machine: what is written for the machine that can.

    engines/<target>/{decoder,vision,audio}.onnx   the graphs
    engines/<target>/kernels/                      the plugins' kernels as PTX (`plugin_kernels`)
    engines/<target>/build.json                    what the builder needs beside the manifest

On that machine `crab-edge build-engine BUNDLE --target T --out NEW` makes the same bundle with engines in
place of the graphs. It needs crab-edge and the machine's TensorRT: no torch, no compiler, no onnx.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import BundleError, DependencyError, DeviceError, InputError
from crab_edge.ilora.plugin_kernels import Kernels
from crab_edge.manifest import ENGINES, EngineGraph, EngineInfo

from .engine_build import Job, build_apart
from .targets import Target, target

FILE = "build.json"
KERNELS = "kernels"


class BuildInfo(BaseModel):
    """`build.json`. plugins: how many plugin nodes each graph has; workspace: bytes that a layer may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    workspace: int
    plugins: dict[str, int]


def build_command(name: str) -> str:
    """What to run on a machine of the target."""
    return f"crab-edge build-engine BUNDLE --target {name} --out NEW_BUNDLE"


def write(
    folder: Path, target: Target, plugins: dict[str, int], kernels: Kernels | None, workspace: int
) -> dict[str, str]:
    """Writes what goes beside the graphs into `folder` (engines/<target>).

    Returns the kernels' SHA-256 by name, as the manifest's `plugins` has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = BuildInfo(target=target.name, workspace=workspace, plugins=plugins)
    (folder / FILE).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if kernels is None or not kernels.sets:
        return {}
    kernels.write(folder / KERNELS)
    return kernels.digests


def build_engines(
    bundle: Path,
    name: str | None,
    out: Path,
    *,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Builds the engines of the target `name` (default: the only one that isn't built) and publishes `out`:
    the bundle's files, with engines in place of that target's graphs.

    Raises InputError for a target that isn't there or is built, DependencyError and DeviceError where this
    machine lacks what it takes, EngineError when a build fails; then nothing is published.
    """
    opened = Bundle.open(bundle)
    name = _choose(opened, name)
    info = opened.manifest.engines[name]
    where = target(name)
    check_machine(where, info)
    folder = opened.path / ENGINES / name
    facts = _read(folder / FILE)
    kernels = folder / KERNELS
    with BundleWriter(out, overwrite) as writer:
        version, graphs = info.version, {}
        for part, graph in info.graphs.items():
            report(f"building {part} for {name} (takes minutes)")
            file = f"{ENGINES}/{name}/{part}.engine"
            job = Job(
                info.library,
                opened.path / graph.file,
                writer.path(file),
                graph,
                tuple(info.sm),
                facts.workspace,
                kernels if facts.plugins.get(part) else None,
                facts.plugins.get(part, 0),
            )
            version = build_apart(job)
            graphs[part] = graph.model_copy(update={"file": file})
        skipped = _inputs(info.graphs, name)
        for file in opened.manifest.files:
            if not file.startswith(skipped):
                take(opened.path / file, writer.path(file))
        built = info.model_copy(update={"built": True, "version": version, "graphs": graphs})
        engines = {**opened.manifest.engines, name: built}
        return writer.commit(opened.manifest.model_copy(update={"engines": engines, "created": ""}))


def check_machine(where: Target, info: EngineInfo) -> None:
    """Raises DependencyError or DeviceError when this machine can't build for the target."""
    from crab_edge.engines._cuda import driver
    from crab_edge.engines._tensorrt_check import INSTALL, installed, numbers

    libraries, broken = installed()
    found = libraries.get(info.library)
    if found is None:
        why = broken.get(info.library)
        what = "which isn't installed" if why is None else f"which is here but can't be imported ({why})"
        raise DependencyError(
            f"target {where.name} needs {info.library} {info.version} or newer, {what}; "
            f"{INSTALL[info.library]}"
        )
    if numbers(found) < numbers(info.version):
        raise DependencyError(
            f"target {where.name} needs {info.library} {info.version} or newer, found {found}; on a Jetson "
            "install JetPack 7.2 (TensorRT 10.16), or run the bundle with --engine onnxruntime"
        )
    if where.kind == "rtx":
        # It builds for cards that aren't there.
        return
    gpu = next(iter(driver().gpus()), None)
    if gpu is None or gpu.sm not in info.sm:
        has = "no GPU" if gpu is None else f"{gpu.name} of sm_{gpu.sm}"
        raise DeviceError(
            f"target {where.name} is built on {where.machine}, this one has {has}; run the command there, or "
            f"export for this GPU with --target {f'cuda-sm{gpu.sm}' if gpu else 'rtx'}"
        )


def _choose(opened: Bundle, name: str | None) -> str:
    engines = opened.manifest.engines
    waiting = [one for one, info in engines.items() if not info.built]
    if name is None and len(waiting) == 1:
        return waiting[0]
    if name is None or name not in engines:
        raise InputError(
            f"{opened.path}: engines that wait to be built: {', '.join(waiting) or 'none'}; "
            + ("name one with --target, or " if waiting else "")
            + "add one with `crab-edge export --bundle BUNDLE --target T --out NEW`"
        )
    if engines[name].built:
        raise InputError(
            f"{opened.path}: the engine for {name} is built; to build it anew, give the bundle that "
            "`crab-edge export --target` wrote"
        )
    return name


def _inputs(graphs: dict[str, EngineGraph], name: str) -> tuple[str, ...]:
    """Files of the target that the finished bundle doesn't need: they begin with one of these."""
    folder = f"{ENGINES}/{name}"
    # A graph's weights lie beside it, under the graph's name.
    return (f"{folder}/{KERNELS}/", f"{folder}/{FILE}", *(graph.file for graph in graphs.values()))


def take(source: Path, place: Path) -> None:
    """The same file at another place: linked where the disk allows it, for bundles are never edited."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _read(path: Path) -> BuildInfo:
    again = "copy the bundle again or export the target again"
    try:
        return BuildInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}); {again}") from None
    except ValidationError as error:
        raise BundleError(f"{path}: damaged ({error.errors()[0]['msg']}); {again}") from None

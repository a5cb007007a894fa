"""`crab-edge plan`: whether a model fits a device with a clip, and the nearest plan that does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crab_edge.plan import Plan
    from crab_edge.shape import ModelShape
    from crab_edge.sizes import WeightRecipe


def command(
    model: Annotated[
        str,
        typer.Argument(help="7b, 3b or nano; a model directory; or a bundle, which is taken as it is."),
    ] = "7b",
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory, for a model directory.")] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "-m", help="Memory of the device, e.g. 8GB; default: that of this one."),
    ] = None,
    length: Annotated[float, typer.Option(help="Length of the clip in seconds.")] = 10.0,
    frames: Annotated[
        int | None, typer.Option(min=0, help="Frames of each window; default: as many as `ask` shows.")
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds of a window, 10 to 60.")] = 10.0,
    bits: Annotated[int | None, typer.Option(help="Bits of the decoder: 4, 8 or 32; default 4.")] = None,
    block: Annotated[int | None, typer.Option(help="Weights that share a scale; default 32.")] = None,
    experts: Annotated[str, typer.Option(help="auto, residual4x2, plane4 or unfolded8.")] = "auto",
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="KV cache: float32 or float16; default: float16 for wide models."),
    ] = None,
    answer: Annotated[int, typer.Option(min=1, help="Tokens that an answer may have.")] = 512,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Encoders are closed before the decoder opens.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run the bundle on the packaged clip too, and print both (exit code 3 past 10 %).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Predict disk, memory and tokens of MODEL; if it doesn't fit, name the nearest plan that does.

    Exit code 3 when the wish doesn't fit.
    """
    from crab_edge.memory import total_bytes
    from crab_edge.plan import WIDE, Wish, nearest, plan
    from crab_edge.resolved import check_window, widened
    from crab_edge.tasks.recipes import VIDEO_10

    if measure and model.lower() == "nano":
        model = str(_bundle(model))
    shape, recipe, cache = _model(model, adapter, bits, block, experts)
    kv = kv or cache or ("float16" if shape.hidden > WIDE else "float32")
    _check_kv(kv)
    device = _bytes(memory) if memory else total_bytes()
    if device is None:
        from crab_edge.errors import InputError

        raise InputError("this machine's memory can't be measured; give it with --memory, e.g. --memory 8GB")
    check_window(window)
    if frames is None:
        frames = widened(VIDEO_10, window, length).frames
    wish = Wish(length, frames, window, device, answer, kv, low_memory)
    if measure:
        from crab_edge_apps import _plan_measured

        return _plan_measured.command(_bundle(model), shape, recipe, wish, as_json)
    found = plan(shape, recipe, wish)
    fixed = cache is not None
    other = None if found.fits else nearest(shape, recipe, wish, fixed=fixed)
    if as_json:
        record: dict[str, Any] = {"model": shape.name, **found.to_json(), "parts": _parts(shape, recipe)}
        if not found.fits:
            record["nearest"] = None if other is None else {"changes": other[1], **other[0].to_json()}
        print(json.dumps(record, ensure_ascii=False))
    else:
        _print(shape, found, other)
    return 0 if found.fits else 3


def _model(
    name: str, adapter: Path | None, bits: int | None, block: int | None, experts: str
) -> tuple[ModelShape, WeightRecipe, str | None]:
    """The shape, the recipe, and for a bundle the type of its cache."""
    from crab_edge.errors import InputError
    from crab_edge.manifest import MANIFEST_NAME, read_manifest
    from crab_edge.shape import KNOWN, read_shape
    from crab_edge.sizes import of_manifest, recipe_for

    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        if adapter is not None or bits is not None or block is not None or experts != "auto":
            raise InputError(
                f"{path}: a bundle's recipe is what it is; leave out --bits, --block, --experts, --adapter"
            )
        manifest = read_manifest(path)
        found = of_manifest(manifest)
        if found is None:
            raise InputError(
                f"{path}: doesn't say its encoders' sizes; export it again, or name 7b, 3b or nano"
            )
        return *found, manifest.recipe.kv_dtype
    if name.lower() in KNOWN:
        if adapter is not None:
            raise InputError("--adapter goes with a model directory; 7b, 3b and nano have theirs")
        shape = KNOWN[name.lower()]
    elif path.is_dir():
        shape = read_shape(path, adapter)
    else:
        raise InputError(f"{name}: expected {', '.join(KNOWN)}, a model directory or a bundle")
    return shape, recipe_for(shape, bits or 4, block or 32, experts), None


def _bundle(name: str) -> Path:
    """The bundle to measure: the one that was named, or the packaged one for nano."""
    from crab_edge.bundle import default_bundle
    from crab_edge.errors import InputError
    from crab_edge.manifest import MANIFEST_NAME

    if name.lower() == "nano":
        return default_bundle()
    if not (Path(name) / MANIFEST_NAME).is_file():
        raise InputError(f"{name}: --measure runs a bundle; name one, or nano for the packaged one")
    return Path(name)


def _check_kv(kv: str) -> None:
    from crab_edge.errors import InputError

    if kv not in ("float32", "float16"):
        raise InputError(f"--kv: expected float32 or float16, got {kv!r}")


def _bytes(text: str) -> int:
    """8GB, 7.5 GiB, 512MB -> bytes; a bare number is gigabytes."""
    from crab_edge.errors import InputError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--memory: expected a size such as 8GB, got {text!r}")
    power = "kmgt".index(match[2] or "g") + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _parts(shape: ModelShape, recipe: WeightRecipe) -> dict[str, dict[str, int]]:
    from crab_edge.sizes import parts

    return parts(shape, recipe)


def _print(shape: ModelShape, found: Plan, other: tuple[Plan, list[str]] | None) -> None:
    from crab_edge_apps._sizes import part_lines, size

    recipe = found.recipe
    print(
        f"{shape.name}, {recipe.bits} bits in blocks of {recipe.block}, experts {recipe.experts}: "
        f"{size(found.disk)} on disk"
    )
    for line in part_lines(_parts(shape, recipe)):
        print(f"  {line}")
    _print_run(found)
    if found.fits:
        return
    if other is None:
        print("no plan fits: a smaller model or a larger device is needed")
        return
    plan, changes = other
    print(f"nearest plan that fits: {', '.join(changes)}")
    _print_run(plan)


def _print_run(found: Plan) -> None:
    from crab_edge_apps._sizes import size

    wish, tokens, memory = found.wish, found.tokens, found.memory
    print(
        f"a clip of {wish.seconds:g} s: {wish.windows} window{'s' if wish.windows > 1 else ''} of at most "
        f"{wish.shown_s:g} s with {wish.frames} frames"
    )
    print(
        f"  tokens         {tokens['video']} video + {tokens['audio']} audio + {tokens['text']} text + "
        f"{tokens['answer']} answer = {tokens['total']} of {found.max_positions}"
    )
    for name in ("decoder", "vision", "audio", "cache", "activations", "process"):
        print(f"  {name:<15}{size(memory[name]):>10}")
    verdict = "fits" if found.fits else "DOES NOT FIT"
    print(f"  {'peak':<15}{size(found.peak):>10} of {size(wish.device_bytes)}: {verdict}")

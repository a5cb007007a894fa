"""`crab-edge export`: quantise a float model with its adapter and publish a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crab_edge.errors import InputError


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The bundle folder to write.")],
    model: Annotated[
        Path | None, typer.Option(help="Model directory (config.json, weights, tokenizer, features).")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="With --target: the bundle to make engines from, instead of a model; needs no torch."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory; none exports the bare model.")
    ] = None,
    bits: Annotated[
        int, typer.Option(help="Bits of the decoder's weights: 4, 8, or 32 for float graphs.")
    ] = 4,
    block: Annotated[int, typer.Option(help="Weights that share a scale.")] = 32,
    experts: Annotated[
        str, typer.Option(help="Where experts go: auto, residual4x2, plane4 or unfolded8.")
    ] = "auto",
    accuracy_level: Annotated[
        int, typer.Option(help="4: products on int8 activations (quick); 0: on float32 (exact).")
    ] = 4,
    method: Annotated[
        str,
        typer.Option(help="auto: 4-bit weights rounded with error feedback on the --media; rtn: to nearest."),
    ] = "auto",
    compare: Annotated[
        str,
        typer.Option(
            help="answers: run the float model whole and compare along its answers; layers: hold one layer "
            "of it in memory and compare on the prompts; auto: answers for small models."
        ),
    ] = "auto",
    kv: Annotated[
        str,
        typer.Option(
            "--kv", help="Type of the KV cache: float32, float16, or auto: float16 for wide models."
        ),
    ] = "auto",
    media: Annotated[
        list[Path] | None,
        typer.Option(
            help="Clip to calibrate and compare on: a file, a folder of clips, or one clip's files joined "
            "with commas. Repeat it for several."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Add TensorRT engines: rtx, jetson-orin, jetson-thor or cuda-smNN. Repeat it for several."
        ),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="With --target: tokens that an engine's cache holds (2048).")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="With --target: MB that a layer may use while it runs (1024).")
    ] = None,
    int4: Annotated[
        str | None,
        typer.Option(help="With --target: dequantize or plugin computes 4-bit products (the target's way)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Quantise MODEL with ADAPTER and publish a bundle at OUT, compared with the float model.

    An export that was interrupted goes on when the same command is given again. With --target the bundle gets
    TensorRT engines or, for machines that this one can't build for, what is needed to build them there.
    """
    import warnings

    from crab_edge_apps import _engines
    from crab_edge_apps._progress import with_progress

    wanted = _engines.options(target, capacity, workspace, int4)
    if bundle is not None:
        _check_bundle_options(context, wanted is not None)
        assert wanted is not None
        _report_engines(_engines.add(bundle, out, wanted, overwrite=overwrite), as_json)
        return
    if model is None:
        raise InputError("export needs --model DIR, or --bundle BUNDLE with --target")
    if wanted is not None:
        from crab_edge.shape import read_shape
        from crab_edge.sizes import recipe_for

        shape = read_shape(model, adapter)
        _engines.check(wanted, shape, recipe_for(shape, bits, block, experts), out, overwrite)
    # transformers announces its own renames; nobody here can act on them.
    warnings.simplefilter("ignore", FutureWarning)
    export_bundle = _exporter()
    clips = [_files(entry) for entry in media or []]
    options: dict[str, Any] = {
        "bits": bits,
        "block": block,
        "accuracy_level": accuracy_level,
        "experts": experts,
        "kv_dtype": kv,
        "method": method,
        "compare": compare,
        "calibration_media": clips or None,
    }

    def export(place: Path, replace: bool = True) -> Path:
        return with_progress(
            lambda progress: export_bundle(
                model, adapter, place, overwrite=replace, progress=progress, **options
            ),
            "reading the model",
        )

    if wanted is None:
        path = export(out, overwrite)
    else:
        path = _engines.export_and_add(export, out, wanted, overwrite=overwrite)
    _report(path, as_json)


def _check_bundle_options(context: typer.Context, engines: bool) -> None:
    """A bundle's recipe is what it is: options that would choose another are refused, not ignored."""
    if not engines:
        raise InputError("--bundle goes with --target, which isn't given")
    takes = ("bundle", "out", "target", "capacity", "workspace", "int4", "overwrite", "as_json")
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in takes and source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name.replace('_', '-')} doesn't go with --bundle, whose recipe is made already"
            )


def _exporter() -> Any:
    from crab_edge.errors import DependencyError

    try:
        from crab_edge_export import export_bundle
    except ImportError as error:
        raise DependencyError(
            f"exporting needs the package {error.name}; run `pip install 'crab-edge[export]'`"
        ) from error
    return export_bundle


def _files(entry: Path) -> Path | list[Path]:
    """A clip's files: a file whose name has commas in it is still one file."""
    if entry.exists() or "," not in str(entry):
        return entry
    return [Path(part) for part in str(entry).split(",")]


def _report(path: Path, as_json: bool) -> None:
    from crab_edge.manifest import read_manifest

    manifest = read_manifest(path)
    model, recipe, parity = manifest.model, manifest.recipe, manifest.parity
    if as_json:
        record = {
            "bundle": str(path),
            "engines": _engine_records(manifest),
            "size": manifest.total_size,
            "recipe": recipe.model_dump(),
            "parts": _parts(manifest),
            "parity": parity,
        }
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"{path}  {model.name}, {recipe.name}, {manifest.total_size / 1e6:.1f} MB")
    _print_parts(manifest)
    if model.adapter is not None:
        used = model.adapter.adapted_linears - model.adapter.zero_linears
        idle = f", {model.adapter.zero_linears} all-zero ones left out" if model.adapter.zero_linears else ""
        print(f"adapter: {used} linears, experts {recipe.experts}{idle}")
    weights = parity["weights"].get(f"{recipe.bits}-bit")
    if weights is not None:
        methods = ", ".join(f"{count} by {name}" for name, count in weights["methods"].items())
        print(f"{recipe.bits}-bit weights: {methods}; mean error {weights['mean_error']:.2%}")
    which = f"{parity['inputs']} prompts" + (" (held-out clips)" if parity["held_out"] else "")
    print(
        f"against the float model on {len(parity['examples'])} {which}, "
        f"{parity['positions']} positions: greedy agreement {parity['greedy_agreement']:.1%}, "
        f"logit error {parity['logits_error']['mean']:.1%}"
    )
    if parity.get("compared", "").startswith("layer"):
        print(f"  ({parity['compared']})")
    _print_engines(path)


def _report_engines(path: Path, as_json: bool) -> None:
    from crab_edge.manifest import read_manifest

    manifest = read_manifest(path)
    if as_json:
        record = {
            "bundle": str(path),
            "engines": _engine_records(manifest),
            "size": manifest.total_size,
        }
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"{path}  {manifest.model.name}, {manifest.recipe.name}, {manifest.total_size / 1e6:.1f} MB")
    _print_engines(path)


def _engine_records(manifest: Any) -> dict[str, Any]:
    return {name: engine.model_dump(mode="json") for name, engine in manifest.engines.items()}


def _print_engines(path: Path) -> None:
    from crab_edge_apps import _engines

    for line in _engines.lines(path):
        print(line)


def _parts(manifest: Any) -> dict[str, dict[str, int]] | None:
    from crab_edge.sizes import of_manifest, parts

    found = of_manifest(manifest)
    return None if found is None else parts(*found)


def _print_parts(manifest: Any) -> None:
    """Where the bundle's bytes are."""
    from crab_edge_apps._sizes import part_lines

    for line in part_lines(_parts(manifest) or {}):
        print(f"  {line}")

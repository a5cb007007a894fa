"""`crab-edge export`: quantise a float model with its adapter and publish a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    model: Annotated[Path, typer.Option(help="Model directory (config.json, weights, tokenizer, features).")],
    out: Annotated[Path, typer.Option(help="The bundle folder to write.")],
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Quantise MODEL with ADAPTER and publish a bundle at OUT, compared with the float model.

    An export that was interrupted goes on when the same command is given again.
    """
    import warnings

    from crab_edge_apps._progress import with_progress

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
        "overwrite": overwrite,
    }
    path = with_progress(
        lambda progress: export_bundle(model, adapter, out, progress=progress, **options), "reading the model"
    )
    _report(path, as_json)


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


def _parts(manifest: Any) -> dict[str, dict[str, int]] | None:
    from crab_edge.sizes import of_manifest, parts

    found = of_manifest(manifest)
    return None if found is None else parts(*found)


def _print_parts(manifest: Any) -> None:
    """Where the bundle's bytes are."""
    from crab_edge_apps._sizes import part_lines

    for line in part_lines(_parts(manifest) or {}):
        print(f"  {line}")

"""`crab-edge verify`: every byte of a bundle against its manifest, and what the bundle is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="Bundle folder; default: the packaged crab-nano."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check a bundle in full (every hash) and print its identity, recipe, sizes and parity."""
    from crab_edge.bundle import Bundle, default_bundle

    path = default_bundle() if bundle is None else bundle
    opened = Bundle.open(path, full=True)
    # What only shows once they are read.
    _ = (opened.features, opened.prompt, opened.embedding)
    if as_json:
        report = {
            "path": str(opened.path),
            "identity": opened.identity,
            **opened.manifest.model_dump(mode="json"),
        }
        print(json.dumps(report, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.markup import escape

    manifest = opened.manifest
    model, recipe = manifest.model, manifest.recipe
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(opened.identity)}[/bold] [green]intact[/green] [dim]{escape(str(opened.path))}[/dim]"
    )
    adapter = model.adapter
    facts = {
        "model": f"{model.name}, {model.n_parameters / 1e6:.1f} M parameters, "
        f"{model.layers} layers of {model.hidden_size}",
        "adapter": "none"
        if adapter is None
        else f"I-LoRA, rank {adapter.rank}, {adapter.experts} experts, {adapter.adapted_linears} linears",
        "recipe": f"{recipe.name}: {recipe.bits}-bit blocks of {recipe.block}, experts {recipe.experts}, "
        f"head {recipe.head_bits}, embedding {recipe.embedding_bits}, towers {recipe.tower_bits} bits, "
        f"cache {recipe.kv_dtype}",
        "written": f"{manifest.created or 'at an unknown time'} by crab-edge {manifest.crab_edge}, "
        f"schema {manifest.schema_version}",
        "needs": ", ".join(f"{name} {wanted}" for name, wanted in manifest.requires.items()),
    }
    for name, text in facts.items():
        console.print(f"  {name:<9}{escape(text)}")
    for name, info in sorted(manifest.files.items()):
        console.print(f"  {'file':<9}{escape(name):<24}{info.size:>12,} bytes  [dim]{info.sha256[:16]}[/dim]")
    for name, value in _flat(manifest.parity):
        console.print(f"  {'parity':<9}{escape(name)} = {escape(str(value))}")


def _flat(parity: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested figures as dotted names."""
    out: list[tuple[str, Any]] = []
    for name, value in parity.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{name}.")
        else:
            out.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else value))
    return out

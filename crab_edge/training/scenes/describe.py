"""The mix of rendered lists: what `crab-edge scenes mix` and `crab-edge evaluate` print."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crab_edge.errors import InputError


def describe_mix(records_dir: str | Path) -> list[str]:
    """Lines for every list under the folder (or of the list file itself).

    InputError if there is none, or a list whose records weren't rendered here (they lack the field `scene`).
    """
    path = Path(records_dir)
    lists = [path] if path.is_file() else sorted(path.glob("*/*.json")) or sorted(path.glob("*.json"))
    if not lists:
        raise InputError(
            f"{path}: no record lists here; render some with `crab-edge scenes render --out {path}`"
        )
    lines = []
    for file in lists:
        records = json.loads(file.read_text("utf-8"))
        if not all(isinstance(r, Mapping) and isinstance(r.get("scene"), Mapping) for r in records):
            raise InputError(
                f"{file}: records without the field `scene`: not rendered by `crab-edge scenes render`"
            )
        lines.append(f"{file.parent.name}/{file.stem}: {len(records)} records")
        lines += [f"  {line}" for line in mix_lines(records)]
    return lines


def mix_lines(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The mix of one list. Records of one scene (several questions) count once."""
    scenes = list(
        {
            json.dumps(
                [value for name, value in r.items() if name.endswith("_path") and name != "mask_path"]
            ): r["scene"]
            for r in records
        }.values()
    )
    total = max(len(scenes), 1)
    sizes = sorted(s for scene in scenes for s in scene["size, % of the frame's side"])
    seconds = sorted(scene["seconds"] for scene in scenes)
    seen = {c for scene in scenes for c in scene["classes in view"]}
    heard = {c for scene in scenes for c in scene["classes heard"]}
    silent = sum(bool(scene["silent object in view"]) for scene in scenes)
    lines = [
        f"scenes {len(scenes)}; "
        f"objects in view {_shares(Counter(s['objects in view'] for s in scenes), total)}",
        f"silent object in view {100 * silent / total:.0f} %; "
        f"sounds {_shares(Counter(s['sounds'] for s in scenes), total)}; "
        f"sounding objects in view {_shares(Counter(s['sounding objects in view'] for s in scenes), total)}",
    ]
    if sizes:
        lines.append(f"sizes {_spread(sizes)} % of the frame's side")
    lines.append(f"seconds {_spread(seconds)}; classes in view {len(seen)}, heard {len(heard)}")
    for note in dict.fromkeys(scene["note"] for scene in scenes if scene.get("note")):
        lines.append(f"note: {note}")
    return lines


def _shares(counts: Counter, total: int) -> str:
    return ", ".join(f"{value}: {100 * counts[value] / total:.0f} %" for value in sorted(counts))


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{values[0]:g} to {values[-1]:g}, median {values[len(values) // 2]:g}"

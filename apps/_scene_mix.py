"""What rendered scenes hold, from their records: the mix that figures were measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_VALUES = 8


def scene_mix(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the records' `scene` fields hold, a line each: shares of few values, else least, most, median.

    A list counts each of its items. Records that carry no `scene` object give nothing.
    """
    scenes = [record["scene"] for record in records if isinstance(record.get("scene"), Mapping)]
    lines = []
    for name in dict.fromkeys(key for scene in scenes for key in scene):
        values: list[Any] = []
        for scene in scenes:
            value = scene.get(name)
            values += value if isinstance(value, list) else [value] if value is not None else []
        text = _distribution(values)
        if text:
            lines.append(f"{name}: {text}")
    return lines


def _distribution(values: Sequence[Any]) -> str:
    plain = [value for value in values if isinstance(value, bool | int | float | str)]
    counts = Counter("yes" if v is True else "no" if v is False else str(v) for v in plain)
    if not plain:
        return ""
    if len(counts) <= _MOST_VALUES:
        ordered = sorted(counts.items(), key=lambda item: (_sortable(item[0]), item[0]))
        return ", ".join(f"{value} {100 * count / len(plain):.0f} %" for value, count in ordered)
    if all(isinstance(value, int | float) for value in plain):
        ordered_values = sorted(plain)
        middle = ordered_values[len(plain) // 2]
        return f"{ordered_values[0]:.3g} to {ordered_values[-1]:.3g}, median {middle:.3g}"
    return f"{len(counts)} different"


def _sortable(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")

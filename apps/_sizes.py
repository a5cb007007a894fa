"""Bytes as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def size(count: float) -> str:
    """1.23 GB, 45.6 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def part_lines(parts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """One line for each part of a model, with what of it are scales."""
    for part, kinds in parts.items():
        scales = f" (scales {size(kinds['scales'])})" if kinds.get("scales") else ""
        yield f"{part:<15}{size(sum(kinds.values())):>10}{scales}"

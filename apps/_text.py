"""Text from files and models on its way to a terminal."""

from __future__ import annotations


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with control characters (but `keep`) spelled out, so that they can't act on the terminal."""
    if text.isprintable():
        return text
    spelled = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return "".join(spelled)

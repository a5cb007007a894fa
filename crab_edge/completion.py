"""How a grammar comes to its end soon: searched over bytes, so that no vocabulary has to be walked.

A vocabulary of 150,000 tokens makes each step of such a search a hundred times dearer, and the text that is
found is the same.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from crab_edge.errors import EngineError

# Letters that open different words lead to completions of different length; one of these few is short enough.
_LETTERS_TRIED = 3
# What tells places in an answer apart, few marks first: the more, the longer the search.
_MARKS = tuple(map(re.compile, (rb"[<(\[]|[0-9][,;:)\]]", rb"[^A-Za-z0-9 ]", rb"(?s:.)")))
# A search this wide means that the grammar has no end within reach.
_SEARCH_LIMIT = 20_000
_PRINTABLE = range(0x20, 0x7F)


class _Outlook(NamedTuple):
    """What may follow in a state: the end, one certain text, or a choice of characters (few letters)."""

    accepting: bool = False
    forced: bytes = b""
    choices: bytes = b""


@cache
def _alphabet() -> Any:
    """A tokenizer whose tokens 0 to 255 are the bytes."""
    import llguidance

    return llguidance.LLTokenizer("byte")


class Completer:
    """Texts that bring one grammar to its end. The grammar has been compiled for a vocabulary before."""

    def __init__(self, lark: str) -> None:
        import llguidance

        self._start = llguidance.LLMatcher(
            _alphabet(), llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
        )

    def after(self, text: bytes) -> bytes:
        """What to say after the beginning `text` for an end soon, in about the fewest choices; b"" at one.

        EngineError when none is found.
        """
        here = self._start.deep_copy()
        if text and not here.consume_tokens(list(text)):
            raise EngineError(f"the grammar doesn't allow {text.decode('utf-8', 'replace')!r}")
        for marks in _MARKS:
            found = _search(here, marks)
            if found is not None:
                return found
        raise EngineError("no end of the grammar was found; bound its repetitions")


def _search(matcher: Any, marks: re.Pattern[bytes]) -> bytes | None:
    """Fewest choices of a character first: what is certain costs nothing.

    States count as the same when they look alike two steps ahead and as many `marks` stand before them:
    without that, the second of two points would pass for the first.
    """
    order = itertools.count()
    heap: list[tuple[int, int, int, Any, bytes, _Outlook]] = [(0, 0, 0, matcher, b"", _outlook(matcher))]
    seen: set[tuple[int, _Outlook, tuple[_Outlook, ...]]] = set()
    while heap and next(order) < _SEARCH_LIMIT:
        chosen, length, _, state, text, outlook = heapq.heappop(heap)
        if outlook.accepting:
            return text
        children = []
        for step in [outlook.forced] if outlook.forced else [bytes([byte]) for byte in outlook.choices]:
            child = state.deep_copy()
            if child.consume_tokens(list(step)):
                children.append((step, child, _outlook(child)))
        alike = len(marks.findall(text)), outlook, tuple(look for _, _, look in children)
        if alike in seen:
            continue
        seen.add(alike)
        chosen += not outlook.forced
        for step, child, look in children:
            heapq.heappush(heap, (chosen, length + len(step), next(order), child, text + step, look))
    return None


def _outlook(state: Any) -> _Outlook:
    if state.is_accepting():
        return _Outlook(accepting=True)
    forced = state.compute_ff_bytes()
    return _Outlook(forced=forced) if forced else _Outlook(choices=bytes(_few(state)))


def _few(state: Any) -> Iterator[int]:
    """Printable bytes that are allowed, few letters among them, what isn't a letter first."""
    mask = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), count=256, bitorder="little")
    letters = []
    for byte in _PRINTABLE:
        if not mask[byte]:
            continue
        if chr(byte).isalpha():
            letters.append(byte)
        else:
            yield byte
    # Lower case first: that is how labels are written.
    yield from sorted(letters, reverse=True)[:_LETTERS_TRIED]

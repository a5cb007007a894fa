"""Task grammars compiled for a bundle's vocabulary by llguidance: which tokens keep an answer in its form.

A task's `grammar` is a Lark grammar in llguidance's dialect. It speaks of a window of ten seconds; for
another its rule `span` is fitted: no event starts after the clip's end, and a longer window has more seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import DependencyError, EngineError, InputError, TaskError
from crab_edge.tasks import MODEL_CONTEXT, MediaContext, Task, grammars

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle

# A rule of the name `span` with its alternatives on further lines, and `spans` after it.
_SPAN_RULE = re.compile(r"^span[ \t]*:.*\n(?:[ \t]+\|.*\n)*(?P<several>spans[ \t]*:.*\n)?", re.MULTILINE)
# Letters that open different words lead to completions of different length; one of these few is short enough.
_LETTERS_TRIED = 3
# What tells places in an answer apart, few marks first: the more, the longer the search.
_MARKS = tuple(map(re.compile, (rb"[<(\[]|[0-9][,;:)\]]", rb"[^A-Za-z0-9 ]", rb"(?s:.)")))
# A search this wide means that the grammar has no end within reach.
_SEARCH_LIMIT = 20_000


def require() -> Any:
    """The module llguidance; DependencyError with the way out when it isn't installed."""
    try:
        import llguidance
    except ModuleNotFoundError:
        raise DependencyError(
            "holding answers to their task's form needs llguidance, which isn't installed; "
            "run `pip install llguidance`, or give --no-grammar"
        ) from None
    return llguidance


def window_seconds(context: MediaContext) -> tuple[int, int]:
    """How many whole seconds 0, 1, ... of the window an event may start at, and the last it may end at.

    At least one, and at least the ten that the model was trained on.
    """
    length = math.ceil(context.end_s - context.start_s)
    seconds = min(max(length, grammars.WINDOW_SECONDS), grammars.LONGEST_SECONDS)
    inside = (second for second in range(seconds) if context.start_s + second >= context.end_s)
    return max(1, next(inside, seconds)), seconds


def for_window(lark: str, starts: int, seconds: int = grammars.WINDOW_SECONDS) -> str:
    """The grammar with its rule `span` and, after it, `spans`, as far as it has them, fitted to a window.

    `span` is "(S E)" in whole seconds, S < E <= `seconds` and S < `starts`.
    """
    if starts == seconds == grammars.WINDOW_SECONDS:
        return lark
    span, several = grammars.spans(starts, seconds).rsplit("spans:", 1)
    return _SPAN_RULE.sub(lambda rule: span + (f"spans:{several}" if rule["several"] else ""), lark)


class _Outlook(NamedTuple):
    """What may follow in a state: the end, one certain text, or a choice of characters (few letters)."""

    accepting: bool = False
    forced: bytes = b""
    choices: bytes = b""


class Vocabulary:
    """A bundle's tokens as llguidance needs them: the bytes of each id and the ids that end an answer."""

    def __init__(self, bundle: Bundle) -> None:
        self._library = require()
        model = bundle.manifest.model
        self.size = model.vocab_size
        self.eos_ids = tuple(model.eos_ids)
        try:
            self._tokenizer = self._library.LLTokenizer(
                bundle.prompt.tokenizer_json(), n_vocab=self.size, eos_token=list(self.eos_ids)
            )
        except Exception as error:  # all that the library raises
            raise EngineError(
                f"llguidance can't read the bundle's tokenizer ({error}); give --no-grammar"
            ) from error
        self._special = frozenset(bundle.prompt.special.model_dump().values())

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text; special tokens and unused ids add nothing."""
        if token in self._special or self._tokenizer.is_special_token(token):
            return b""
        return self._tokenizer.decode_bytes([token])

    def ids(self, text: bytes) -> list[int]:
        """Tokens of plain text."""
        return self._tokenizer.tokenize_bytes(text)

    def compile(self, lark: str) -> Any:
        """A matcher at the grammar's start; TaskError with llguidance's reason for a grammar it refuses."""
        matcher = self._library.LLMatcher(
            self._tokenizer, self._library.LLMatcher.grammar_from_lark(lark), log_level=0
        )
        if matcher.is_error():
            raise TaskError(f"llguidance refuses the grammar: {' '.join(matcher.get_error().split())}")
        return matcher

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """The token of each printable ASCII character that has one of its own."""
        found = {byte: self.ids(bytes([byte])) for byte in range(0x20, 0x7F)}
        return {byte: ids[0] for byte, ids in found.items() if len(ids) == 1}

    def allowed(self, matcher: Any) -> NDArray[np.bool_]:
        """bool [vocabulary]: what the grammar allows next; the end tokens too where it accepts.

        EngineError when the matcher has given up.
        """
        mask = self._mask(matcher)
        if matcher.is_accepting():
            mask[list(self.eos_ids)] = 1
        return mask.view(np.bool_)

    def _mask(self, matcher: Any) -> NDArray[np.uint8]:
        """uint8 [vocabulary], 1 where the grammar allows the id."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise EngineError(f"llguidance gave up: {' '.join(matcher.get_error().split())}")
        return np.unpackbits(bits, count=self.size, bitorder="little")

    def completion(self, matcher: Any) -> list[int]:
        """Few tokens that bring the grammar to its end: about the shortest such text. [] where it accepts.

        EngineError when none is found.
        """
        for marks in _MARKS:
            text = self._search(matcher, marks)
            if text is not None:
                return self.ids(text)
        raise EngineError("no end of the grammar was found; bound its repetitions")

    def _search(self, matcher: Any, marks: re.Pattern[bytes]) -> bytes | None:
        """Shortest first over characters. States count as the same when they look alike two steps ahead and
        as many `marks` stand before them: without that, the second of two points would pass for the first.
        """
        order = itertools.count()
        here = matcher.deep_copy()
        heap: list[tuple[int, int, Any, bytes, _Outlook]] = [(0, 0, here, b"", self._outlook(here))]
        seen: set[tuple[int, _Outlook, tuple[_Outlook, ...]]] = set()
        while heap and next(order) < _SEARCH_LIMIT:
            length, _, state, text, outlook = heapq.heappop(heap)
            if outlook.accepting:
                return text
            children = []
            for step in [outlook.forced] if outlook.forced else [bytes([byte]) for byte in outlook.choices]:
                child = state.deep_copy()
                if child.consume_tokens(self.ids(step)):
                    children.append((step, child, self._outlook(child)))
            alike = len(marks.findall(text)), outlook, tuple(look for _, _, look in children)
            if alike in seen:
                continue
            seen.add(alike)
            for step, child, look in children:
                heapq.heappush(heap, (length + len(step), next(order), child, text + step, look))
        return None

    def _outlook(self, state: Any) -> _Outlook:
        if state.is_accepting():
            return _Outlook(accepting=True)
        forced = state.compute_ff_bytes()
        return _Outlook(forced=forced) if forced else _Outlook(choices=bytes(self._few(self._mask(state))))

    def _few(self, mask: NDArray[np.uint8]) -> Iterator[int]:
        """Printable bytes that are allowed, few letters among them, what isn't a letter first."""
        letters = []
        for byte in self._printable[mask[self._printable_ids] == 1].tolist():
            if chr(byte).isalpha():
                letters.append(byte)
            else:
                yield byte
        # Lower case first: that is how labels are written.
        yield from sorted(letters, reverse=True)[:_LETTERS_TRIED]

    @cached_property
    def _printable(self) -> NDArray[np.int64]:
        return np.array(list(self.byte_ids))

    @cached_property
    def _printable_ids(self) -> NDArray[np.int64]:
        return np.array(list(self.byte_ids.values()))


@dataclass(frozen=True)
class Form:
    """A task's compiled grammar; `shortest` is about its shortest sentence, `tokens` that as tokens."""

    vocabulary: Vocabulary
    start: Any
    shortest: bytes
    tokens: int

    def matcher(self) -> Any:
        """A matcher of one's own, at the grammar's start."""
        return self.start.deep_copy()


class Grammars:
    """The forms of one bundle, compiled when they are first asked for."""

    def __init__(self, bundle: Bundle) -> None:
        self.vocabulary = Vocabulary(bundle)
        self._forms: dict[str, Form] = {}

    def form(self, task: Task, context: MediaContext = MODEL_CONTEXT, limit: int | None = None) -> Form:
        """The task's grammar for a window.

        TaskError when it doesn't compile; InputError when its shortest sentence has over `limit` tokens.
        """
        lark = for_window(task.grammar, *window_seconds(context))
        if lark not in self._forms:
            try:
                matcher = self.vocabulary.compile(lark)
            except TaskError as error:
                raise TaskError(f"task {task.name}: {error}") from None
            ids = self.vocabulary.completion(matcher)
            text = b"".join(map(self.vocabulary.bytes_of, ids))
            self._forms[lark] = Form(self.vocabulary, matcher, text, len(ids))
        form = self._forms[lark]
        if limit is not None and form.tokens > limit:
            raise InputError(
                f"the shortest answer of task {task.name} takes {form.tokens} tokens, but only {limit} are "
                "allowed; allow more with --max-tokens, or give --no-grammar"
            )
        return form

"""Task grammars compiled for a bundle's vocabulary by llguidance: which tokens keep an answer in its form.

A task's `grammar` is a Lark grammar in llguidance's dialect. It speaks of a window of ten seconds; for
another its rule `span` is fitted: no event starts after the clip's end, and a longer window has more seconds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.completion import Completer
from crab_edge.errors import DependencyError, EngineError, InputError, TaskError
from crab_edge.tasks import MODEL_CONTEXT, MediaContext, Task, grammars

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle

# A rule of the name `span` with its alternatives on further lines, then `spans` as `grammars.spans` has it.
_SPAN_RULE = re.compile(
    r"^span[ \t]*:.*\n(?:[ \t]+\|.*\n)*(?P<several>spans: span\{1,\d+\}\n)?", re.MULTILINE
)


def require() -> Any:
    """The module llguidance; DependencyError with the way out when it isn't installed."""
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError(
            f"holding answers to their task's form needs llguidance, which can't be imported ({error}); "
            "run `pip install llguidance`, or give --no-grammar (in Python grammar=False)"
        ) from None
    return llguidance


def window_seconds(context: MediaContext) -> tuple[int, int]:
    """How many whole seconds 0, 1, ... of the window an event may start at, and the last it may end at.

    At least one, and at least the ten that the model was trained on; a window's tail of up to a second (files
    of ten seconds are often a little longer) is none of its own.
    """
    seconds = grammars.WINDOW_SECONDS
    length = context.end_s - context.start_s
    if length > seconds + 1:
        seconds = math.ceil(min(length, grammars.LONGEST_SECONDS) - 0.5)
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
                f"llguidance can't read the bundle's tokenizer ({error}); give --no-grammar "
                "(in Python grammar=False)"
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

    def allows(self, matcher: Any, token: int) -> bool:
        """Whether the grammar allows this id next, without a walk through the vocabulary.

        Where the next bytes are certain, `allowed` has the longest tokens of them only; this takes any.
        """
        if token in self.eos_ids:
            return bool(matcher.is_accepting())
        return bool(matcher.validate_tokens([token]) == 1)

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


@dataclass(frozen=True)
class Form:
    """A task's compiled grammar; `shortest` is about its shortest sentence, of `tokens` tokens."""

    vocabulary: Vocabulary
    start: Any
    completer: Completer
    shortest: bytes
    tokens: int

    def matcher(self) -> Any:
        """A matcher of one's own, at the grammar's start."""
        return self.start.deep_copy()

    def completion(self, text: bytes) -> list[int]:
        """Few tokens that bring the form to its end after its beginning `text`. EngineError without any."""
        return self.vocabulary.ids(self.completer.after(text))


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
            completer = Completer(lark)
            text = completer.after(b"")
            tokens = len(self.vocabulary.ids(text))
            self._forms[lark] = Form(self.vocabulary, matcher, completer, text, tokens)
        form = self._forms[lark]
        if limit is not None and form.tokens > limit:
            raise InputError(
                f"the shortest answer of task {task.name} takes {form.tokens} tokens, but only {limit} are "
                "allowed; allow more with --max-tokens, or give --no-grammar (in Python grammar=False)"
            )
        return form

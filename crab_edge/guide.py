"""Picks the tokens of an answer so that it comes out in its task's form.

An answer has two parts. The free text (the model's reasoning) is the model's own, token by token, until one
of the task's openings stands in it. The tagged part that begins there is greedy among the tokens that the
grammar allows. The opening is forced when the model ends without one, after `FREE_TOKENS`, and when the next
token would make the whole answer unreadable (a stray tag, half a box). A whole answer ends where the model's
own next token isn't part of the form. Towards the token limit only such tokens are taken as leave room for
the rest of the form, so that a short limit shortens an answer and never cuts it in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from crab_edge.errors import EngineError, InputError, TaskError
from crab_edge.results import Unparsed
from crab_edge.tasks import MediaContext, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.grammar import Grammars, Vocabulary

#: Free text may take so many tokens before the opening is forced.
FREE_TOKENS = 256
# So many tokens are kept for the tagged part, if the limit is long.
_KEPT = 192
# With so many left beside twice the shortest answer, every token is checked for leaving room for the rest.
_CAREFUL = 32
# So many of the best tokens are tried for one that leaves room; then the shortest way to the end is taken.
_TRIES = 4


class Guide(Protocol):
    """Chooses the next token. `finished` says that nothing may follow; `shortened` that the limit chose.

    `held` counts the tokens that the model itself would have chosen otherwise.
    """

    held: int

    @property
    def finished(self) -> bool: ...

    @property
    def shortened(self) -> bool: ...

    def choose(self, logits: NDArray[np.float32], remaining: int) -> int:
        """The next id, an end token included; `remaining` tokens may still be said, this one included."""
        ...


def guide(grammars: Grammars, task: Task, context: MediaContext, limit: int) -> Guide:
    """The guide of one answer about one window; `limit` bounds its tokens.

    Raises TaskError for a grammar that doesn't compile or that the task's own parser refuses, InputError
    for a limit that no answer fits.
    """

    def readable(text: bytes) -> bool:
        parsed = task.parse(text.decode("utf-8", "replace"), context)
        return not any(isinstance(result, Unparsed) for result in parsed)

    if not task.grammar.strip():
        return FreeText(grammars.vocabulary, readable)
    return Tagged(grammars, task, context, readable, limit)


class FreeText:
    """Free text all along; it only may not end, or stay invisible, before there is any."""

    finished = shortened = False
    # So many spaces and quotation marks may stand before the text.
    _LEADING, _MARKS = 4, " \n\"'\u201c\u2018"

    def __init__(self, vocabulary: Vocabulary, readable: Callable[[bytes], bool]) -> None:
        self.held = 0
        self._vocabulary, self._readable = vocabulary, readable
        self._text = b""
        self._begun = False
        self._leading = 0

    def choose(self, logits: NDArray[np.float32], remaining: int) -> int:
        """See `Guide`."""
        token = int(np.argmax(logits))
        leads = remaining > self._LEADING and self._leads(token)
        if not self._begun and not leads and not self._begins(token):
            token = next((int(i) for i in np.argsort(-logits, kind="stable") if self._begins(int(i))), token)
            self.held += 1
        if not self._begun:
            self._text += self._vocabulary.bytes_of(token)
            self._begun = self._readable(self._text)
        return token

    def _begins(self, token: int) -> bool:
        said = self._vocabulary.bytes_of(token).decode("utf-8", "ignore").strip(self._MARKS)
        return token not in self._vocabulary.eos_ids and said[:1].isalnum()

    def _leads(self, token: int) -> bool:
        said = self._vocabulary.bytes_of(token).decode("utf-8", "ignore")
        leads = bool(said) and not said.strip(self._MARKS) and self._leading < self._LEADING
        self._leading += leads
        return leads


class Tagged:
    """Free text, then the tagged part under the grammar. See the module's text."""

    def __init__(
        self,
        grammars: Grammars,
        task: Task,
        context: MediaContext,
        readable: Callable[[bytes], bool],
        limit: int,
    ) -> None:
        self.held = 0
        form = grammars.form(task, context, limit)
        if not readable(form.shortest):
            raise TaskError(
                f"task {task.name}: its grammar allows {form.shortest.decode('utf-8', 'replace')!r}, which "
                "its parser can't read; correct the declaration"
            )
        self._name, self._form, self._vocabulary = task.name, form, grammars.vocabulary
        self._opens = tuple(opening.encode() for opening in task.opens)
        self._readable = readable
        self._matcher: Any = form.matcher()
        self._text = self._tagged = b""
        self._free = bool(self._opens)
        # Half of a short limit, or enough of a long one, is kept for the tagged part.
        kept = max(form.tokens + 1, min(_KEPT, limit // 2))
        self._free_left = min(FREE_TOKENS, limit - kept)
        self._careful = _CAREFUL + 2 * form.tokens
        self._way: list[int] | None = None
        self.shortened = False

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing but the end."""
        return not self._free and self._matcher.is_stopped()

    def choose(self, logits: NDArray[np.float32], remaining: int) -> int:
        """See `Guide`. InputError when not even the shortest answer fits."""
        own = int(np.argmax(logits))
        if self._free:
            # What ends the free text may have to be followed by a whole tagged part.
            room = self._free_left > 0 and remaining > self._form.tokens + 1
            if room and own not in self._vocabulary.eos_ids and self._goes_on(own):
                self._free_left -= 1
                return own
            self._open()
        if self._vocabulary.allows(self._matcher, own):
            best = own
        elif self._matcher.is_accepting():
            # Whatever the model adds to a whole answer isn't part of it, and no reason for another event.
            return self._vocabulary.eos_ids[0]
        else:
            best = self._best(logits)
        token = best if remaining > self._careful else self._fitting(best, logits, remaining)
        self.held += self._differ(token, own)
        if token in self._vocabulary.eos_ids:
            return token
        if self._way is not None:
            self._way = self._way[1:] if self._way and self._way[0] == token else None
        if not self._matcher.consume_token(token):
            raise EngineError(f"llguidance gave up: {' '.join(self._matcher.get_error().split())}")
        self._tagged += self._vocabulary.bytes_of(token)
        return token

    def _differ(self, token: int, own: int) -> bool:
        """Whether two tokens say different things: not where both are mere marks."""
        if token == own:
            return False
        said = self._vocabulary.bytes_of(token) + self._vocabulary.bytes_of(own)
        return own in self._vocabulary.eos_ids or any(chr(byte).isalnum() for byte in said)

    def _best(self, logits: NDArray[np.float32]) -> int:
        """The best token that the grammar allows."""
        return int(np.argmax(np.where(self._vocabulary.allowed(self._matcher), logits, -np.inf)))

    def _goes_on(self, token: int) -> bool:
        """Takes a token of free text, or the one that completes an opening; False if it may not be said."""
        text = self._text + self._vocabulary.bytes_of(token)
        longest = max(map(len, self._opens))
        begins = [text.find(opening, max(0, len(self._text) - longest + 1)) for opening in self._opens]
        at = min((begin for begin in begins if begin >= 0), default=None)
        if at is None:
            if not self._readable(text + self._form.shortest):
                return False
            self._text = text
            return True
        matcher = self._form.matcher()
        tail = self._vocabulary.ids(text[at:])
        if matcher.try_consume_tokens(tail) < len(tail):
            return False
        if not self._readable(text[:at] + self._form.shortest):
            return False
        self._matcher, self._free, self._tagged = matcher, False, text[at:]
        return True

    def _open(self) -> None:
        """Ends the free text; half an opening at its end is gone on with."""
        self._free = False
        for length in range(max(map(len, self._opens)) - 1, 0, -1):
            tail = self._text[-length:]
            if len(tail) == length and any(opening.startswith(tail) for opening in self._opens):
                ids = self._vocabulary.ids(tail)
                matcher = self._form.matcher()
                if matcher.try_consume_tokens(ids) == len(ids):
                    self._matcher, self._tagged = matcher, tail
                    return

    def _fitting(self, best: int, logits: NDArray[np.float32], remaining: int) -> int:
        """The best token after which the rest of the form still fits into the limit."""
        if self._way is None:
            self._way = self._form.completion(self._tagged)
        if len(self._way) > remaining:
            raise InputError(
                f"the shortest answer of task {self._name} needs {len(self._way)} more tokens, but "
                f"{remaining} are left; allow more with --max-tokens, or give a shorter clip or question"
            )
        for token in self._tries(best, logits):
            if token in self._vocabulary.eos_ids or self._way[:1] == [token]:
                break
            after = self._matcher.deep_copy()
            after.consume_token(token)
            rest = self._rest(after, token, remaining - 1)
            if rest is not None:
                self._way = [token, *rest]
                break
        else:
            token = self._way[0] if self._way else self._vocabulary.eos_ids[0]
        self.shortened |= token != best
        return token

    def _tries(self, best: int, logits: NDArray[np.float32]) -> Iterator[int]:
        """The few best tokens that the grammar allows, in order; the first is known."""
        yield best
        allowed = np.flatnonzero(self._vocabulary.allowed(self._matcher))
        order = allowed[np.argsort(-logits[allowed], kind="stable")[:_TRIES]]
        yield from (int(token) for token in order if token != best)

    def _rest(self, after: Any, token: int, most: int) -> list[int] | None:
        """At most so many tokens that complete the answer after `token`; None when that isn't found."""
        # Most tokens leave the way as it was but for its first steps; searching costs a hundred times more.
        way = self._way or []
        for step in range(len(way)):
            tail = way[step:]
            if len(tail) <= most and after.validate_tokens(tail) == len(tail):
                end = after.deep_copy()
                if end.consume_tokens(tail) and end.is_accepting():
                    return tail
        rest = self._form.completion(self._tagged + self._vocabulary.bytes_of(token))
        return rest if len(rest) <= most else None

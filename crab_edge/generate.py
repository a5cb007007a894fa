"""The loop around an engine: prefix from media, suffix from text, then one token after another.

A prefix stays in the KV cache until another one is needed: the next question about the same media rewinds to
it. Chunks always end at the same places, so an answer doesn't depend on what was asked before.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from crab_edge.errors import EngineError, InputError
from crab_edge.plan import prefill_chunk
from crab_edge.positions import next_position, tmrope
from crab_edge.prompt import MediaItem
from crab_edge.resolved import Part, Shown, Spent
from crab_edge.router import RouterTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle
    from crab_edge.engines import Engine, Tracer
    from crab_edge.guide import Guide

    Encoded = tuple[MediaItem, NDArray[np.float32]]
    """A medium's placeholders and their embeddings [tokens, H]."""

KEPT_ENCODINGS = 8
MEDIA = ("video", "image", "audio")


class Cancelled(Exception):
    """The caller asked to stop while a prompt was being read."""


class Generator:
    """Greedy generation over one engine and its one KV cache. Not thread-safe: `Model` guards it."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.ended = False
        self._prefix: tuple[str, ...] | None = None
        self._prefix_length = 0
        self._prefix_position = 0
        self._encodings: OrderedDict[str, Encoded] = OrderedDict()

    def start(
        self,
        shown: Shown,
        instruction: str,
        spent: Spent,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[NDArray[np.float32], int]:
        """Fills the cache with the prompt: logits of its last token, and the position of the answer's first.

        Raises InputError when prompt and one token of answer are more than the model can hold; Cancelled,
        before an encoder or a chunk of the prompt, once `cancelled` says so: a whole prefix stays, a part
        of one doesn't.
        """
        suffix = self.bundle.prompt.suffix(instruction)
        if self._prefix == shown.key and self.engine.length >= self._prefix_length:
            spent.cached_tokens += self._prefix_length
            self.engine.rewind(self._prefix_length)
            spent.prompt_tokens += self._prefix_length + len(suffix)
            self._check_room(self._prefix_length + len(suffix))
        else:
            self._fill_prefix(shown, len(suffix), spent, cancelled)
        positions = tmrope(
            suffix, self.bundle.prompt.special, (), self.bundle.features, start=self._prefix_position
        )
        logits = self._forward(self.bundle.embedding.rows(suffix), positions, spent, cancelled)
        return logits, next_position(positions)

    def _fill_prefix(
        self, shown: Shown, suffix_length: int, spent: Spent, cancelled: Callable[[], bool] | None
    ) -> None:
        encoded = []
        for part in shown.parts:
            _leave_if(cancelled)
            encoded.append(self._encode(part, spent))
        ids = self.bundle.prompt.prefix(shown.lead, [item for item, _ in encoded])
        spent.prompt_tokens += len(ids) + suffix_length
        self._check_room(len(ids) + suffix_length)
        embeds, positions = self._prefix_inputs(ids, encoded)
        self._prefix = None
        self.engine.rewind(0)
        self._forward(embeds, positions, spent, cancelled)
        self._prefix, self._prefix_length = shown.key, len(ids)
        self._prefix_position = next_position(positions)

    def _prefix_inputs(
        self, ids: NDArray[np.int64], encoded: Sequence[Encoded]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Embeddings [S, H] and positions [3, S] of a prefix with its media."""
        special = self.bundle.prompt.special
        positions = tmrope(ids, special, [item for item, _ in encoded], self.bundle.features)
        embeds = self.bundle.embedding.rows(ids)
        media = np.isin(ids, (special.video, special.image, special.audio))
        if encoded:
            embeds[media] = np.concatenate([rows for _, rows in encoded])
        return embeds, positions

    def trace(
        self, tracer: Tracer, shown: Shown, instruction: str, answer: Sequence[int], spent: Spent
    ) -> RouterTrace:
        """The routers' weights over a prompt and the `answer` (token ids) that was generated for it.

        One teacher-forced pass beside the engine's cache, which stays as it is.
        """
        encoded = [self._encode(part, spent) for part in shown.parts]
        started = time.perf_counter()
        prompt = self.bundle.prompt
        prefix = prompt.prefix(shown.lead, [item for item, _ in encoded])
        suffix, said = prompt.suffix(instruction), np.array(answer, np.int64)
        embeds, before = self._prefix_inputs(prefix, encoded)
        after = tmrope(suffix, prompt.special, (), self.bundle.features, start=next_position(before))
        first = next_position(after)
        spoken = np.broadcast_to(np.arange(first, first + len(said)), (3, len(said)))
        rest = self.bundle.embedding.rows(np.concatenate([suffix, said]))
        weights = tracer(np.concatenate([embeds, rest]), np.concatenate([before, after, spoken], axis=1))
        media = {getattr(prompt.special, name): name for name in MEDIA}
        modality = [media.get(int(i), "text") for i in (*prefix, *suffix)] + ["answer"] * len(said)
        pieces = prompt.pieces([*prefix, *suffix]) + prompt.pieces(answer)
        texts = ["" if name in MEDIA else piece for piece, name in zip(pieces, modality, strict=True)]
        spent.trace_s += time.perf_counter() - started
        return RouterTrace(tracer.layers, weights, tuple(texts), tuple(modality))

    def _encode(self, part: Part, spent: Spent) -> Encoded:
        known = self._encodings.get(part.key)
        if known is None:
            item, rows = part.encode(self.engine, self.bundle.features, spent)
            if len(rows) != item.tokens:
                raise EngineError(
                    f"the {part.kind} encoder returned {len(rows)} tokens, expected {item.tokens}; "
                    "rebuild the bundle with `crab-edge export`"
                )
            known = self._encodings[part.key] = (item, rows)
            if len(self._encodings) > KEPT_ENCODINGS:
                self._encodings.popitem(last=False)
        self._encodings.move_to_end(part.key)
        return known

    @property
    def room(self) -> int:
        """Tokens that prompt and answer may have together: the model's, or fewer where the engine's cache
        is.
        """
        positions = self.bundle.manifest.model.max_positions
        return min(positions, getattr(self.engine, "capacity", positions))

    def _check_room(self, tokens: int) -> None:
        model, limit = self.bundle.manifest.model, self.room
        if tokens >= limit:
            holder = model.name if limit == model.max_positions else f"the cache of engine {self.engine.name}"
            raise InputError(
                f"the prompt takes {tokens} tokens, but {holder} holds {limit}; give a shorter clip or "
                "question"
            )

    def _forward(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.int64],
        spent: Spent,
        cancelled: Callable[[], bool] | None,
    ) -> NDArray[np.float32]:
        """embeds [S, H], positions [3, S], in chunks; logits [V] of the last token. May be Cancelled."""
        logits = None
        step = prefill_chunk(embeds.shape[1])
        started = time.perf_counter()
        try:
            for begin in range(0, len(embeds), step):
                _leave_if(cancelled)
                chunk = slice(begin, begin + step)
                logits = self.engine.forward(embeds[None, chunk], positions[:, None, chunk])
        finally:
            spent.prefill_s += time.perf_counter() - started
        assert logits is not None
        return logits

    def tokens(
        self,
        logits: NDArray[np.float32],
        position: int,
        limit: int,
        cancelled: Callable[[], bool] | None,
        guide: Guide | None = None,
    ) -> Iterator[int]:
        """Greedy tokens up to the end token (left out), `limit`, or `cancelled`.

        With a `guide`, greedy among the tokens that it allows. Afterwards `ended` says whether the answer
        came to its own end: the model ended it, or its form did, and the limit had no part in it.
        """
        model = self.bundle.manifest.model
        self.ended = False
        limit = min(limit, self.room - self.engine.length + 1)
        for count in range(limit):
            if cancelled is not None and cancelled():
                return
            token = int(np.argmax(logits))
            if not np.isfinite(logits[token]):
                raise EngineError(
                    "the decoder's logits aren't finite; rebuild the bundle with `crab-edge export`"
                )
            if guide is not None:
                token = guide.choose(logits, limit - count)
            if token in model.eos_ids:
                self.ended = guide is None or not guide.shortened
                return
            yield token
            if guide is not None and guide.finished:
                self.ended = not guide.shortened
                return
            if count + 1 < limit:
                embeds = self.bundle.embedding.rows(np.array([token]))[None]
                logits = self.engine.forward(embeds, np.full((3, 1, 1), position + count, np.int64))


def _leave_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled

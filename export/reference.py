"""What the float model says: answers of a model that fits in memory, or a walk through one that doesn't.

Both keep what they found in the work folder, so that an export that goes on doesn't run them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from crab_edge_calibration.statistics import InputMoments, input_moments
from numpy.typing import NDArray

from crab_edge.engines.torch import TorchEngine

from . import parity
from .decoder import ROOT
from .examples import ExampleSet
from .layered import LayeredEngine
from .prompts import Prompt, collect
from .weights import canonical
from .workspace import Workspace

Arrays = dict[str, NDArray[Any]]
Tick = Callable[[], None]
# Wider linears are calibrated with mean squares only: x x^T of all of them wouldn't fit in memory. One layer
# at a time, there is room for more.
FULL_MOMENT_WIDTH = {"whole": 2048, "layers": 4096}


class StoredMoments(Mapping[str, NDArray[np.float32]]):
    """Moments of linears' inputs by canonical name, read from the work folder when asked for."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self._files: dict[str, str] = {}

    def add(self, file: str, names: list[str]) -> None:
        """Moments that `file` holds."""
        self._files |= dict.fromkeys(names, file)

    def drop(self, file: str) -> None:
        """Their linears are written: the file goes."""
        self._files = {name: at for name, at in self._files.items() if at != file}
        self._work.drop(file)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._work.array(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def watches(method: str, inputs: str, bits: int) -> bool:
    """Whether inputs are watched: noise doesn't say which channels matter, and float graphs need nothing."""
    return method != "rtn" and inputs != "synthetic" and bits != 32


def _full(bits: int, limit: int) -> Callable[[str, int], bool]:
    """The whole moment is kept where it pays (4-bit linears) and fits."""
    return lambda name, width: bits == 4 and canonical(name).startswith(f"{ROOT}.") and width <= limit


def answers(
    work: Workspace,
    engine: Callable[[], TorchEngine],
    side: Callable[[TorchEngine], Any],
    sets: tuple[ExampleSet, ExampleSet, bool],
    watch: bool,
    bits: int,
    tick: Tick,
) -> tuple[list[parity.Trace], StoredMoments]:
    """The float model's own greedy answers to the comparison prompts, and moments over the calibration ones.

    sets: calibration prompts, comparison prompts, whether those are others. The whole model is in memory.
    """
    calibration, comparison, held_out = sets
    moments = StoredMoments(work)
    note = work.entry("answers")
    if note is None:
        model = engine()
        floats = side(model)
        limit = FULL_MOMENT_WIDTH["whole"]
        watched: AbstractContextManager[Any] = nullcontext()
        if watch:
            watched = input_moments(model.model, _full(bits, limit))
        with watched as seen:
            references = parity.reference(floats, model, calibration, tick)
        if held_out:
            references = parity.reference(floats, model, comparison, tick)
        del model, floats
        found = {} if seen is None else {canonical(n): m for n, m in seen.moments().items()}
        files = work.keep_arrays("state/answers.npz", parity.trace_arrays(references))
        files |= work.keep_arrays("state/moments.npz", found)
        note = {"count": len(references), "moments": list(found)}
        work.done("answers", note, files)
    moments.add("state/moments.npz", note["moments"])
    return parity.traces_of(work.arrays("state/answers.npz"), note["count"]), moments


class Walk:
    """The float model layer by layer over all prompts: hidden states go from layer to layer through files.

    `prompts()` runs the encoders, `reach(i)` walks the decoder up to and with layer i, `logits()` the head.
    While a layer's moments are needed they lie in `moments`; `forget(i)` drops them.
    """

    def __init__(
        self,
        work: Workspace,
        engine: LayeredEngine,
        side: Any,
        sets: tuple[ExampleSet, ExampleSet, bool],
        watch: bool,
        bits: int,
        tick: Callable[[str], Tick],
    ) -> None:
        self.work = work
        self.engine = engine
        self.moments = StoredMoments(work)
        self._side = side
        self._calibration, self._comparison, self._held_out = sets
        self._watch = watch
        self._full = _full(bits, FULL_MOMENT_WIDTH["layers"])
        self._tick = tick
        self._prompts: tuple[list[Prompt], list[Prompt]] | None = None
        self._walked = 0

    def prompts(self) -> list[Prompt]:
        """The comparison prompts with the float encoders' outputs."""
        if self._prompts is None:
            self._prompts = self._encode()
        return self._prompts[1] if self._held_out else self._prompts[0]

    def _encode(self) -> tuple[list[Prompt], list[Prompt]]:
        file, held = "state/prompts.npz", "state/moments.towers.npz"
        note = self.work.entry("prompts")
        if note is None:
            tick = self._tick("running the float encoders")
            with self._watching() as seen:
                first = collect(self._side, self.engine, self._calibration, tick)
            second = collect(self._side, self.engine, self._comparison, tick) if self._held_out else []
            arrays: Arrays = {}
            for name, found in (("a", first), ("b", second)):
                for i, prompt in enumerate(found):
                    arrays |= prompt.arrays(f"{name}{i}")
            moments = _taken(seen)
            files = self.work.keep_arrays(file, arrays) | self.work.keep_arrays(held, moments)
            note = {"a": len(first), "b": len(second), "moments": list(moments)}
            self.work.done("prompts", note, files)
        self.moments.add(held, note["moments"])
        arrays = self.work.arrays(file)
        first, second = ([Prompt.of(arrays, f"{n}{i}") for i in range(note[n])] for n in "ab")
        return first, second

    def _watching(self) -> AbstractContextManager[Any]:
        return input_moments(self.engine.model, self._full) if self._watch else nullcontext()

    def start(self, written: int) -> None:
        """Find where an earlier run stopped; `written`: how many layers' weights are written already.

        The walk may be one layer ahead of the writing, whose moments are still there; if more is missing
        the walk begins anew.
        """
        self.prompts()
        walked = 0
        while (note := self.work.entry(f"walk {walked}")) is not None:
            walked += 1
            if walked > written:
                self.moments.add(f"state/moments.{walked - 1}.npz", note["moments"])
        if walked > written + 1 or (walked and not self.work.has(f"state/hidden.{walked - 1}.npz")):
            for i in range(walked):
                self.work.forget(f"walk {i}")
            walked = 0
        self._walked = walked

    def reach(self, i: int) -> None:
        """Walk the layers up to and with i, as far as that hasn't been done."""
        while self._walked <= i:
            self._layer(self._walked)
            self._walked += 1

    def _layer(self, i: int) -> None:
        assert self._prompts is not None
        tick = self._tick("running the float model")
        every = [*self._prompts[0], *self._prompts[1]]
        hidden = self._hidden(i - 1)
        out = []
        with self._watching() as seen, self.engine.layer(i) as run:
            for number, (x, prompt) in enumerate(zip(hidden, every, strict=True)):
                if seen is not None:
                    seen.enabled = number < len(self._prompts[0])
                out.append(run(x, prompt.positions))
        moments = _taken(seen)
        compared = self._compared(out)
        rows = {str(n): x[-p.asked :] for n, (x, p) in enumerate(zip(compared, self.prompts(), strict=True))}
        kept, held = f"state/rows.{i}.npz", f"state/moments.{i}.npz"
        files = self.work.keep_arrays(kept, rows)
        if moments:
            # They may go once the layer is written, so they aren't among the files that are checked.
            self.work.keep_arrays(held, moments)
        self.work.keep_arrays(f"state/hidden.{i}.npz", {str(n): x for n, x in enumerate(out)})
        self.work.done(f"walk {i}", {"moments": list(moments)}, files)
        self.moments.add(held, list(moments))
        self.work.drop(f"state/hidden.{i - 1}.npz")
        tick()

    def _hidden(self, i: int) -> list[NDArray[np.float32]]:
        assert self._prompts is not None
        if i < 0:
            return [prompt.embeds for prompt in (*self._prompts[0], *self._prompts[1])]
        arrays = self.work.arrays(f"state/hidden.{i}.npz")
        return [arrays[str(n)] for n in range(len(arrays))]

    def _compared(self, every: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        assert self._prompts is not None
        return every[len(self._prompts[0]) :] if self._held_out else every

    def forget(self, i: int) -> None:
        """Layer i is written: its moments go."""
        self.moments.drop(f"state/moments.{i}.npz")

    def rows(self, i: int) -> list[NDArray[np.float32]]:
        """Hidden states behind layer i of every comparison prompt's own text."""
        arrays = self.work.arrays(f"state/rows.{i}.npz")
        return [arrays[str(n)] for n in range(len(arrays))]

    def logits(self) -> list[NDArray[np.float32]]:
        """Logits [asked, V] of every comparison prompt's own text. Moments of the head's input come along."""
        file, held = "state/logits.npz", "state/moments.head.npz"
        note = self.work.entry("float head")
        if note is None:
            assert self._prompts is not None
            seen = InputMoments(lambda name, width: False)
            hidden = self._hidden(self._walked - 1)
            if self._watch:
                for x in hidden[: len(self._prompts[0])]:
                    self.engine.normed(x, seen.add)
            rows = [
                self.engine.logits(x[-p.asked :])
                for x, p in zip(self._compared(hidden), self.prompts(), strict=True)
            ]
            files = self.work.keep_arrays(file, {str(n): x for n, x in enumerate(rows)})
            moments = _taken(seen)
            files |= self.work.keep_arrays(held, moments)
            note = {"moments": list(moments)}
            self.work.done("float head", note, files)
        self.moments.add(held, note["moments"])
        arrays = self.work.arrays(file)
        return [arrays[str(n)] for n in range(len(arrays))]


def _taken(seen: InputMoments | None) -> Arrays:
    return {} if seen is None else {canonical(n): m for n, m in seen.moments().items()}

"""Open a model, open a clip, ask it.

`Model` owns a bundle and an engine, `Session` a clip. All tasks of one clip share one decode, and all
questions with the same media recipe share one prompt prefix.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge import engines, tasks
from crab_edge.asked import Asked
from crab_edge.bundle import Bundle, default_bundle
from crab_edge.clip import Clip, Window
from crab_edge.errors import CrabError, InputError, TaskError
from crab_edge.generate import Cancelled, Generator
from crab_edge.guide import guide
from crab_edge.resolved import (
    WINDOW_S,
    Spent,
    check_stride,
    check_window,
    context,
    heard,
    misfit,
    resolve,
    streams,
    unused,
    widened,
    windows,
)
from crab_edge.results import Answer
from crab_edge.tasks import MediaRecipe, Task

if TYPE_CHECKING:
    from crab_edge.batch import Row
    from crab_edge.engines import Engine, Traceable, Tracer
    from crab_edge.grammar import Grammars

QUESTION_TASK = "avqa"
MAX_NEW_TOKENS = 512
# Frames of so many seconds of windows are decoded in one go; more would hold hours of video in memory.
AHEAD_S = 300.0


def load(
    bundle: str | Path | Bundle | None = None,
    engine: str | Engine = "auto",
    *,
    threads: int | None = None,
    low_memory: bool | None = None,
    provider: str | None = None,
) -> Model:
    """Opens a bundle (default: the one in the package) on an engine: "onnxruntime", "onnxruntime:cuda",
    "tensorrt", "tensorrt:TARGET", "torch", or "auto".

    low_memory: encoders are closed before the decoder runs, and opened again for the next media; None lets
    the engine decide. provider: of ONNX Runtime, "cpu", "cuda" or "tensorrt-rtx"; the same as behind the
    colon. Raises BundleError, DependencyError, EngineError or InputError, each with one line that says what
    to do.
    """
    if bundle is None:
        bundle = default_bundle()
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if not isinstance(engine, str):
        return Model(opened, engine)
    wished = {"low_memory": low_memory, "provider": provider}
    options = {name: value for name, value in wished.items() if value is not None}
    return Model(opened, engines.create(engine, opened, threads=threads, **options))


class Model:
    """A bundle on an engine. One answer at a time: a second thread waits for the first one's answer.

    `grammar`: whether answers are held to their task's form where a request doesn't say.
    """

    grammar = True

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self._generator = Generator(bundle, engine)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._grammars: Grammars | None = None

    def open(
        self,
        *media: str | Path | Sequence[str | Path | tuple[str | Path, str]] | Clip,
        kinds: Mapping[Path, str] | None = None,
        max_minutes: float | None = 10.0,
        stride_s: float | None = None,
        window_s: float = WINDOW_S,
    ) -> Session:
        """Opens one clip: a media file, or several that belong together (an image and its sound).

        `kinds` forces a file's kind ("video", "image", "audio"), as pairs (path, kind) in a list do.
        Longer clips than `max_minutes` are refused. `stride_s`: windows of a long clip start so many seconds
        apart (default: their length). `window_s`: their length, 10 s (what models are trained on) to 60; a
        longer window shows as many frames a second. Raises MediaError or InputError.
        """
        if len(media) == 1 and isinstance(media[0], Clip):
            clip = media[0]
        else:
            paths: list[str | Path | tuple[str | Path, str]] = []
            for entry in media:
                if isinstance(entry, Clip):
                    raise InputError("give either one opened clip or paths, not both")
                paths.extend([entry] if isinstance(entry, (str, Path)) else entry)
            clip = Clip.open(paths, kinds=kinds, max_minutes=max_minutes)
        if isinstance(self.engine, engines.Warmable):
            self.engine.warm(vision=bool(clip.videos or clip.images), audio=bool(clip.audios))
        return Session(self, clip, stride_s=stride_s, window_s=window_s)

    def analyze(self, paths: Iterable[str | Path], tasks: Sequence[str], **options: Any) -> Iterator[Row]:
        """Many clips, lazily: a row for each clip and task, errors as rows. See `crab_edge.batch.analyze`."""
        from crab_edge.batch import analyze

        return analyze(self, paths, tasks, **options)

    def grammars(self) -> Grammars:
        """The tasks' grammars compiled for this bundle. DependencyError without llguidance."""
        if self._grammars is None:
            from crab_edge.grammar import Grammars

            self._grammars = Grammars(self.bundle)
        return self._grammars

    def traceable(self) -> Traceable:
        """The engine, if it can read back the routers of this bundle; InputError if not."""
        name = self.bundle.manifest.model.name
        if self.bundle.manifest.model.adapter is None:
            raise InputError(
                f"{name} has no I-LoRA adapter, so there is no router to trace; ask without a router trace"
            )
        if not isinstance(self.engine, engines.Traceable):
            raise InputError(
                f"engine {self.engine.name} can't trace routers; use onnxruntime, or ask without a trace"
            )
        return self.engine

    def _acquire(self) -> None:
        if self._owner == threading.get_ident():
            raise CrabError("another answer of this model is still being streamed; finish or close it first")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def _release(self) -> None:
        self._owner = None
        self._lock.release()


class Stream:
    """An answer on its way: iterate for text pieces, then read `answer`. `close` stops it early."""

    def __init__(self, pieces: Iterator[str], asked: Asked) -> None:
        self._pieces = pieces
        self._asked = asked

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating. What was said until then is the answer, with a notice."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def answer(self) -> Answer:
        """The answer; what hasn't been read of the stream is read first."""
        for _ in self._pieces:
            pass
        return self._asked.answer()


class Session:
    """One clip, ready for questions. `clip` is what was decoded, `notices` what is odd about it."""

    def __init__(
        self, model: Model, clip: Clip, *, stride_s: float | None = None, window_s: float = WINDOW_S
    ) -> None:
        check_window(window_s)
        check_stride(stride_s, window_s)
        self.model = model
        self.clip = clip
        self.stride_s = stride_s
        self.window_s = window_s
        self._ahead = max(1, int(AHEAD_S / window_s))
        """Windows whose frames are decoded in one go."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about the clip, such as an empty audio track."""
        return tuple(self.clip.notices)

    def applicable(self, trained: bool = False) -> list[Task]:
        """The tasks that were made for a clip like this one, those that need a question included.

        `trained`: only those that the model was trained on, if it says which.
        """
        known = self.model.bundle.manifest.model.tasks if trained else None
        found = [task for task in tasks.applicable(streams(self.clip)) if misfit(self.clip, task) is None]
        return [task for task in found if known is None or task.name in known]

    def ask(
        self,
        question: str | None = None,
        task: str | None = None,
        *,
        frame: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cancelled: Callable[[], bool] | None = None,
        grammar: bool | None = None,
        router: bool = False,
    ) -> Answer | list[Answer]:
        """One answer to a question or a task; with neither, the answers of every task that applies.

        Those are the tasks that the model was trained on, where it says so; of tasks that show and ask the
        same (data sets of one kind), the first is asked. `frame`: which of the five or ten equal parts of its
        video's sound a picture belongs to, for the tasks that hear one part of it. `grammar`: the tagged
        part of an answer is held to its task's form, so that it always parses (unless it is `cancelled`
        half-way); without, it is what the model says, and may be `Unparsed`; default: the model's `grammar`.
        With `router` the answer holds the weights of the decoder's routers for every token
        (`crab_edge.router.RouterTrace`), from a pass over prompt and answer after each window's text; a
        window whose text was `cancelled` has none.

        Raises TaskError for a task that is unknown, doesn't take this clip, or needs a question;
        DependencyError for `grammar` without llguidance; InputError where no answer is as short as
        `max_new_tokens`, and for `router` where the bundle has no adapter or the engine can't trace.
        """
        how: dict[str, Any] = {
            "frame": frame,
            "max_new_tokens": max_new_tokens,
            "cancelled": cancelled,
            "grammar": grammar,
            "router": router,
        }
        if question is not None or task is not None:
            return self.stream(question, task, **how).answer
        names = [
            task.name for task in tasks.distinct(self.applicable(trained=True)) if not task.needs_question
        ]
        if not names:
            raise TaskError(f"no task takes this clip without a question; {self._hint()}")
        return self.ask_all(names, **how)

    def ask_all(
        self,
        names: Sequence[str],
        question: str | None = None,
        *,
        frame: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cancelled: Callable[[], bool] | None = None,
        grammar: bool | None = None,
        router: bool = False,
    ) -> list[Answer]:
        """Several tasks, answered in the order given; `question` and `frame` go to those that use them.

        Tasks with one media recipe go through a long clip together, so that each window is prefilled once.
        """
        asked = [
            self._asked(
                question if tasks.get(name).needs_question else None,
                name,
                frame,
                max_new_tokens,
                cancelled,
                grammar,
                router,
            )
            for name in names
        ]
        groups: dict[MediaRecipe, list[Asked]] = {}
        for entry in asked:
            groups.setdefault(entry.recipe, []).append(entry)
        # Recipes that differ only in how they cut long media show the same of a short clip: one prefix.
        kin = [replace(recipe, name="", audio="", windowed=False) for recipe in groups]
        order = sorted(zip(map(kin.index, kin), groups.values(), strict=True), key=lambda pair: pair[0])
        if asked:
            for _ in self._pieces([group for _, group in order]):
                pass
        return [entry.answer() for entry in asked]

    def stream(
        self,
        question: str | None = None,
        task: str | None = None,
        *,
        frame: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cancelled: Callable[[], bool] | None = None,
        grammar: bool | None = None,
        router: bool = False,
    ) -> Stream:
        """Like `ask` for one question or task, as a stream of text; the request is checked at once."""
        if task is None and question is None:
            raise TaskError("give a question or a task to stream")
        name = task or QUESTION_TASK
        asked = self._asked(question, name, frame, max_new_tokens, cancelled, grammar, router)
        return Stream(self._pieces([[asked]]), asked)

    def _asked(
        self,
        question: str | None,
        name: str,
        frame: int | None,
        limit: int,
        cancelled: Callable[[], bool] | None,
        grammar: bool | None,
        router: bool,
    ) -> Asked:
        grammar = self.model.grammar if grammar is None else grammar
        task = tasks.get(name)
        reason = misfit(self.clip, task)
        if reason is not None:
            raise TaskError(f"{reason}; {self._hint()}")
        recipe = self._recipe(task)
        notices = [f"task {task.name} doesn't use the clip's {kind}" for kind in unused(self.clip, recipe)]
        if recipe.units and any(heard(recipe, audio.waveform(), frame)[1] for audio in self.clip.audios):
            notices.append(
                f"task {task.name} hears one of {recipe.units} parts of the sound, here the first; "
                "name another one with frame"
            )
        model = self.model.bundle.manifest.model
        if question is not None and unfamiliar(question, model.question_templates):
            notices.append(
                f"unfamiliar question: the small model {model.name} knows the forms of question that it was "
                "trained on, not the world; don't rely on this answer"
            )
        if model.tasks is not None and task.name not in model.tasks:
            known = ", ".join(model.tasks)
            notices.append(f"{model.name} wasn't trained on {task.name} (but on {known}); expect nonsense")
        instruction = task.prompt(question)
        if grammar:
            forms = self.model.grammars()
            if task.grammar.strip():
                forms.form(task, context(self.clip, recipe, self._windows(recipe)[0]), limit)
        if router:
            self.model.traceable()
        how = (limit, cancelled, notices, frame, grammar, router)
        return Asked(task, recipe, self.clip, instruction, question, *how)

    def _recipe(self, task: Task) -> MediaRecipe:
        return widened(task.recipe_for(streams(self.clip)), self.window_s, self.clip.duration_s)

    def _windows(self, recipe: MediaRecipe) -> list[Window | None]:
        return windows(self.clip, recipe, self.stride_s, self.window_s)

    def _hint(self) -> str:
        names = [task.name for task in self.applicable()]
        if names:
            return f"tasks that apply: {', '.join(names)}"
        return "no task takes such a clip; say which file is for what with --video, --image and --audio"

    def prepare(self, names: Sequence[str]) -> None:
        """Decodes what these tasks will need, without touching the engine: for reading ahead in a thread.

        Long sound that a task hears as a whole is left for its turn: that of several clips would fill the
        memory.
        """
        recipes = [self._recipe(tasks.get(name)) for name in names]
        plan = [(recipe, self._windows(recipe)) for recipe in dict.fromkeys(recipes)]
        self._prefetch([(recipe, cut[: self._ahead]) for recipe, cut in plan], Spent())
        for recipe, cut in plan:
            for audio in self.clip.audios[: recipe.audios]:
                if cut[0] is not None and audio.audible(cut[0]):
                    audio.waveform(cut[0])

    def _pieces(self, groups: list[list[Asked]]) -> Iterator[str]:
        """Runs groups of requests that share a recipe; yields their text as it comes."""
        self.model._acquire()
        tracer = None
        try:
            if any(asked.router for group in groups for asked in group):
                tracer = self.model.traceable().tracer()
            plan = [(group, self._windows(group[0].recipe)) for group in groups]
            ahead = [(group[0].recipe, cut[: self._ahead]) for group, cut in plan]
            self._prefetch(ahead, groups[0][0].spent)
            for group, cut in plan:
                for number, window in enumerate(cut):
                    if number and number % self._ahead == 0:
                        coming = cut[number : number + self._ahead]
                        self._prefetch([(group[0].recipe, coming)], group[0].spent)
                    for asked in group:
                        if number:
                            yield "\n"
                        yield from self._window(asked, window, tracer)
                for asked in group:
                    asked.complete = True
        finally:
            if tracer is not None:
                tracer.close()
            self.model._release()

    def _prefetch(self, plan: list[tuple[MediaRecipe, list[Window | None]]], spent: Spent) -> None:
        """Decodes each video once for all the frames that are about to be asked for."""
        started = time.perf_counter()
        for number, video in enumerate(self.clip.videos):
            wanted = [
                (recipe.frames, window) for recipe, cut in plan if number < recipe.videos for window in cut
            ]
            wanted = [(n, window) for n, window in wanted if video.visible(window)]
            if wanted:
                video.prefetch(wanted)
        spent.decode_s += time.perf_counter() - started

    def _window(self, asked: Asked, window: Window | None, tracer: Tracer | None) -> Iterator[str]:
        """One window of one request: prompt, tokens, text, typed results, router trace."""
        if asked.stopped():
            return
        generator, spent = self.model._generator, asked.spent
        about = context(self.clip, asked.recipe, window)
        held = guide(self.model.grammars(), asked.task, about, asked.limit) if asked.grammar else None
        shown = resolve(self.clip, asked.recipe, window, spent, asked.frame)
        try:
            logits, position = generator.start(shown, asked.instruction, spent, asked.cancelled)
        except Cancelled:
            return
        text = self.model.bundle.prompt.stream_decoder()
        ids: list[int] = []
        tokens = generator.tokens(logits, position, asked.limit, asked.cancelled, held)
        try:
            while True:
                started = time.perf_counter()
                token = next(tokens, None)
                spent.generate_s += time.perf_counter() - started
                if token is None:
                    break
                ids.append(token)
                piece = text.push(token)
                if piece:
                    yield piece
            rest = text.finish()
            if rest:
                yield rest
        finally:
            spent.tokens += len(ids)
            raw = self.model.bundle.prompt.decode(ids).strip()
            asked.add(raw, about, ended=generator.ended)
            spent.held_tokens += held.held if held is not None else 0
        if asked.router and tracer is not None and not asked.stopped():
            asked.add_trace(generator.trace(tracer, shown, asked.instruction, ids, spent))


def unfamiliar(question: str, templates: Sequence[str] | None) -> bool:
    """Whether no template of the model matches the whole question; without templates none is unfamiliar."""
    if templates is None:
        return False
    return not any(re.fullmatch(template, question.strip()) for template in templates)

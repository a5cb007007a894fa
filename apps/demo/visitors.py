"""Who has which clip open, what they asked, and how much of it is kept in memory and on disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from crab_edge_apps.demo.asking import suggestions
from crab_edge_apps.demo.look import Look, look_at
from crab_edge_apps.demo.store import Store
from crab_edge_apps.demo.turns import Turn

from crab_edge.errors import CrabError, InputError

if TYPE_CHECKING:
    from crab_edge_apps.demo.worker import Job

    from crab_edge.session import Model, Session
    from crab_edge.tasks import Task

# Decoded frames and sound of so many clips stay in memory; a further clip is decoded again when asked about.
KEPT_DECODED = 3
MOST_VISITORS = 32
IDLE_S = 60 * 60.0
ABANDONED_S = 8 * 60 * 60.0
_MOST_FILES = 6
_MOST_TURNS = 30
_MOST_REMEMBERED = 1000


@dataclass(frozen=True)
class Facts:
    """What the page says about a clip, kept when its decoded media are put away.

    kinds: "video", "image" or "audio" for each file; sizes: (width, height) of each picture stream; trained,
    untrained: the tasks that take it.
    """

    sha256: str
    kinds: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    sound: bool
    notices: tuple[str, ...]
    trained: tuple[Task, ...]
    untrained: tuple[Task, ...]
    suggestions: tuple[str, ...]

    @classmethod
    def of(cls, session: Session, media: Sequence[Path], names: Sequence[str]) -> Facts:
        """Facts of an opened clip; `names` stand for our paths in its notices."""
        clip = session.clip
        videos, images = {video.path for video in clip.videos}, {image.path for image in clip.images}
        trained = session.applicable(trained=True)
        return cls(
            clip.sha256,
            tuple("video" if path in videos else "image" if path in images else "audio" for path in media),
            tuple((video.width, video.height) for video in clip.videos)
            + tuple((image.width, image.height) for image in clip.images),
            bool(clip.audios),
            tuple(renamed(notice, media, names) for notice in session.notices),
            tuple(trained),
            tuple(task for task in session.applicable() if task not in trained),
            tuple(suggestions(session)),
        )


@dataclass
class Visitor:
    """One open page. `names` are the files' names as uploaded, for showing only; `drawn`: task -> picture.

    `session` is None while the decoded media are put away;
    `job` is their last one, `asked` the last that answers; `told` the last whose answer is on the page.
    """

    folder: Path
    media: tuple[Path, ...]
    names: tuple[str, ...]
    look: Look
    facts: Facts
    session: Session | None
    turns: list[Turn] = field(default_factory=list)
    left: tuple[Path, ...] = ()
    drawn: dict[str, str] = field(default_factory=dict)
    job: Job | None = None
    asked: Job | None = None
    told: Job | None = None
    used: float = field(default_factory=time.monotonic)
    number: int = 0

    @property
    def busy(self) -> bool:
        """Whether a job of theirs waits or runs."""
        return self.job is not None and not self.job.finished.is_set()

    def add(self, turn: Turn) -> None:
        """Keeps a turn; the oldest go."""
        self.turns = [*self.turns, turn][-_MOST_TURNS:]


class Visitors:
    """All open pages by Gradio's session hash."""

    def __init__(self, store: Store, model: Model, max_minutes: float) -> None:
        self.store = store
        self.model = model
        self.max_minutes = max_minutes
        self._all: OrderedDict[str, Visitor] = OrderedDict()
        # Pages whose clip was deleted: one that lost its connection still shows it.
        self._without: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Visitor | None:
        """The visitor, if they have a clip open."""
        with self._lock:
            visitor = self._all.get(key)
            if visitor is not None:
                visitor.used = time.monotonic()
                self._all.move_to_end(key)
            return visitor

    def lost(self, key: str) -> bool:
        """Whether the page had a clip that was deleted since."""
        with self._lock:
            return key in self._without

    def open(
        self,
        key: str,
        uploads: Sequence[Path],
        names: Sequence[str],
        *,
        keep: bool = False,
        recorded: bool = False,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Visitor | None:
        """In the decoding thread: opens files as the visitor's clip, which replaces the one before.

        `keep`: the files aren't uploads and stay where they are (the example); `recorded`: the recorder
        still shows them; `unwanted`: asked at the end; where it is true the uploads can be opened again and
        the result is None. Then, and on an error, the clip before stays open. Raises what opening a clip
        raises, with the names that the visitor knows.
        """
        if not uploads:
            raise InputError("no file was given; choose a video, a sound or a picture")
        if len(uploads) > _MOST_FILES:
            raise InputError(f"{len(uploads)} files, expected at most {_MOST_FILES} that belong to one clip")
        folder = self.store.new_folder()
        media: list[Path] = []
        try:
            for number, path in enumerate(uploads):
                media.append(path if keep else self.store.take(path, folder, number, shown=recorded))
            session = self.model.open(list(media), max_minutes=self.max_minutes)
            look = look_at(session.clip)
            facts = Facts.of(session, media, names)
            fresh = Visitor(folder, tuple(media), tuple(names), look, facts, session)
            fresh.left = tuple(uploads) if recorded else ()
            if unwanted():
                if not keep and not recorded:
                    self.store.give_back(media, uploads)
                self.store.remove(folder)
                return None
        except CrabError as error:
            self.store.remove(folder)
            raise type(error)(renamed(str(error), media, names)) from error
        except BaseException:
            self.store.remove(folder)
            raise
        self._replace(key, fresh)
        return fresh

    def session(self, visitor: Visitor) -> Session:
        """The visitor's clip, opened again if it was put away."""
        session = visitor.session
        if session is None:
            session = visitor.session = self.model.open(list(visitor.media), max_minutes=self.max_minutes)
            self._put_away(visitor)
        return session

    def _replace(self, key: str, fresh: Visitor) -> None:
        with self._lock:
            old = self._all.pop(key, None)
            self._all[key] = fresh
            self._without.pop(key, None)
            gone = [old] if old is not None else []
            now = time.monotonic()
            for other, visitor in list(self._all.items()):
                crowded = len(self._all) > MOST_VISITORS or now - visitor.used > IDLE_S
                if other != key and crowded and not visitor.busy:
                    gone.append(self._without_clip(other))
        for visitor in gone:
            self._discard(visitor)
        self._put_away(fresh)

    def forget_abandoned(self) -> None:
        """Removes clips unused for long: a page that lost its connection can't say that it was closed."""
        with self._lock:
            ago = time.monotonic() - ABANDONED_S
            keys = [key for key, visitor in self._all.items() if visitor.used < ago and not visitor.busy]
            gone = [self._without_clip(key) for key in keys]
        for visitor in gone:
            self._discard(visitor)

    def _put_away(self, used: Visitor) -> None:
        """Forgets the decoded media of all but the clip in use and the last few."""
        with self._lock:
            decoded = [v for v in self._all.values() if v.session is not None and v is not used]
            for visitor in decoded[: max(0, len(decoded) - KEPT_DECODED + 1)]:
                # Only forgotten, not closed: a thread may just have begun to use it.
                if not visitor.busy:
                    visitor.session = None

    def leave(self, key: str) -> None:
        """The page was closed: its files go."""
        with self._lock:
            visitor = self._without_clip(key) if key in self._all else None
        if visitor is not None:
            self._discard(visitor)

    def _without_clip(self, key: str) -> Visitor:
        """With the lock held: takes the page's clip away and remembers that."""
        self._without[key] = None
        while len(self._without) > _MOST_REMEMBERED:
            self._without.popitem(last=False)
        return self._all.pop(key)

    def _discard(self, visitor: Visitor) -> None:
        if visitor.job is not None:
            visitor.job.cancel()
        for upload in visitor.left:
            self.store.drop(upload)
        # Removing an open file is fine; the running answer has it open until it ends.
        self.store.remove(visitor.folder)

    def __len__(self) -> int:
        return len(self._all)


def renamed(message: str, media: Sequence[Path], names: Sequence[str]) -> str:
    """An error message with the visitor's file names where it names our paths."""
    for path, name in zip(media, names, strict=False):
        message = message.replace(str(path), name)
    return message

"""Annotated media: an MP4 of each row about a video, a PNG of each row about a picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps._sinks.files import file_name, ready, replaced

from crab_edge.errors import InputError, MediaError
from crab_edge.rows import media_paths

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crab_edge.clip import Clip

#: Rows that are being drawn or wait for it; with more, whoever adds one waits.
_MOST_WAITING = 2


class PictureSink:
    """A file for each row that has something to draw, about one video or one picture.

    Drawn in a thread of its own, in the rows' order; an error there is raised by the next call. Files that
    are there already aren't made again. Media that can't be read any more cost a notice.
    """

    def __init__(self, folder: Path, notice: Callable[[str], None]) -> None:
        # Named by `--sink video`: what is missing should stop the run before it starts.
        import crab_edge_apps._draw  # noqa: F401

        self._folder, self._notice = folder, notice
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._waiting: deque[Future[None]] = deque()

    def begin(self) -> None:
        """Makes the folder."""
        self._wait()  # for what lies there half-drawn
        ready(self._folder)

    def add(self, row: dict[str, Any], clip: Clip | None) -> None:
        """Has the row drawn."""
        from crab_edge_apps._draw import anything

        if not anything([row]) or self._drawn(row):
            return
        shown = None
        if clip is not None:
            with self._passed_over():
                shown = _shown(clip)
            if shown is None:
                return
        self._wait(_MOST_WAITING - 1)
        self._waiting.append(self._thread.submit(self._draw, row, shown))

    def end(self) -> None:
        """Nothing is left open."""

    def close(self) -> None:
        """Waits until all is drawn."""
        try:
            self._wait()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _wait(self, most: int = 0) -> None:
        """Until at most so many rows wait to be drawn; raises what went wrong with one."""
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _files(self, row: dict[str, Any]) -> dict[str, Path]:
        return {suffix: self._folder / file_name(row, suffix) for suffix in (".mp4", ".png")}

    def _drawn(self, row: dict[str, Any]) -> bool:
        return any(path.exists() for path in self._files(row).values())

    def _draw(self, row: dict[str, Any], shown: Path | NDArray[np.uint8] | None) -> None:
        """In the thread. `shown` as `_shown` gives it; None: the row's media are opened again."""
        if self._drawn(row):  # meanwhile, of an equal row
            return
        with self._passed_over():
            if shown is None:
                with self._opened(row) as clip:
                    shown = _shown(clip)
            if isinstance(shown, Path):
                from crab_edge_apps._draw import annotate_video

                annotate_video(shown, [row], self._files(row)[".mp4"])
            elif shown is not None:
                from crab_edge_apps._draw import annotate_image
                from PIL import Image

                picture = annotate_image(shown, row["parsed"], question=row.get("question"))
                with replaced(self._files(row)[".png"], "wb") as file:
                    Image.fromarray(picture).save(file, format="PNG")

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        """One clip that can't be drawn must not end a run, nor every later one when it begins."""
        import av

        try:
            yield
        except (InputError, av.error.FFmpegError, ValueError) as error:
            self._notice(f"not drawn: {' '.join(str(error).split())}")

    def _opened(self, row: dict[str, Any]) -> Clip:
        from crab_edge.bundle import file_sha256
        from crab_edge.clip import Clip

        media = media_paths(row)
        clip = Clip.open(media, max_minutes=None)
        if len(media) == 1 and file_sha256(media[0]) != row.get("sha256"):
            clip.close()
            raise MediaError(f"{media[0]}: changed since it was analysed")
        return clip


def _shown(clip: Clip) -> Path | NDArray[np.uint8] | None:
    """What a clip's results are drawn on: its one video's file, or its one picture [H, W, 3]."""
    if len(clip.videos) == 1:
        return clip.videos[0].path
    return clip.images[0].original() if len(clip.images) == 1 and not clip.videos else None

"""Annotated media: an MP4 of each row about a video, a PNG of each row about a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps._sinks.files import file_name, ready, replaced

from crab_edge.errors import InputError, MediaError
from crab_edge.rows import media_paths

if TYPE_CHECKING:
    from crab_edge.clip import Clip


class PictureSink:
    """A file for each row that has something to draw, about one video or one picture.

    Files that are there already aren't made again. Media that can't be read any more cost a notice.
    """

    def __init__(self, folder: Path, notice: Callable[[str], None]) -> None:
        # Named by `--sink video`: what is missing should stop the run before it starts.
        import crab_edge_apps._draw  # noqa: F401

        self._folder, self._notice = folder, notice

    def begin(self) -> None:
        """Makes the folder."""
        ready(self._folder)

    def add(self, row: dict[str, Any], clip: Clip | None) -> None:
        """Draws the row."""
        import av
        from crab_edge_apps._draw import anything

        names = {suffix: self._folder / file_name(row, suffix) for suffix in (".mp4", ".png")}
        if not anything([row]) or any(path.exists() for path in names.values()):
            return
        try:
            if clip is not None:
                self._draw(row, clip, names)
            else:
                with self._opened(row) as again:
                    self._draw(row, again, names)
        except (InputError, av.error.FFmpegError, ValueError) as error:
            # One clip that can't be drawn must not end a run, nor every later one when it begins.
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

    def _draw(self, row: dict[str, Any], clip: Clip, names: dict[str, Path]) -> None:
        if len(clip.videos) == 1:
            from crab_edge_apps._draw import annotate_video

            annotate_video(clip.videos[0].path, [row], names[".mp4"])
        elif len(clip.images) == 1 and not clip.videos:
            from crab_edge_apps._draw import annotate_image
            from PIL import Image

            picture = annotate_image(clip.images[0].original(), row["parsed"], question=row.get("question"))
            with replaced(names[".png"], "wb") as file:
                Image.fromarray(picture).save(file, format="PNG")

    def end(self) -> None:
        """Nothing is left open."""

    def close(self) -> None:
        """Nothing is left open."""

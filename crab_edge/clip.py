"""A clip: media files opened together, their pictures and sound decoded on demand and once.

    clip = Clip.open(["violin.mp4"])
    frames = clip.videos[0].frames(10)          # uint8 [10, 224, 224, 3]
    wave = clip.audios[0].waveform()            # float32 [n], 16 kHz mono

A file's kind is found from its content. Nothing is replaced by zeros or by other frames: what can't be used
raises a `MediaError` that names the file and what to do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from crab_edge.errors import InputError, MediaError
from crab_edge.media_audio import AudioTrack
from crab_edge.media_image import IMAGE_SIZE, StillImage, sniff
from crab_edge.media_io import Window, check_file, check_length, scan, shown
from crab_edge.media_video import VideoTrack

__all__ = ["IMAGE_SIZE", "AudioTrack", "Clip", "StillImage", "VideoTrack", "Window"]

KINDS = ("video", "image", "audio")
# A tail shorter than this (s) is heard with the window before it.
_SHORTEST_TAIL_S = 1.0


class Clip:
    """Opened media.

    paths: as given; videos, images, audios: in that order; notices: what a user should know about the media;
    duration_s: end of the longest track, 0 for pictures alone. Not for use by two threads at once.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        kinds: tuple[str | None, ...],
        videos: list[VideoTrack],
        images: list[StillImage],
        audios: list[AudioTrack],
        notices: list[str],
    ) -> None:
        self.paths = paths
        self.videos, self.images, self.audios = videos, images, audios
        self._kinds = kinds
        self._notices = notices
        self._digests: list[bytes] | None = None

    @classmethod
    def open(
        cls,
        media: Sequence[str | Path | tuple[str | Path, str]],
        *,
        kinds: Mapping[Path, str] | None = None,
        max_minutes: float | None = 10.0,
        sha256: Sequence[str] | None = None,
    ) -> Clip:
        """Open media files.

        media: paths; a video with sound gives one video and one audio. kinds: "video", "image" or "audio" for
        paths of which only that is to be used; a pair (path, kind) among the media says it for that entry.
        max_minutes: the longest track allowed, None for any. sha256: of each file's bytes (hex), where it is
        known already. Raises MediaError for a file that is missing, isn't media, is damaged or empty;
        InputError beyond max_minutes.
        """
        if isinstance(media, (str, Path)):
            media = [media]
        if not media:
            raise InputError("no media given; expected at least one video, picture or sound file")
        if max_minutes is not None and not max_minutes > 0:
            raise InputError(f"--max-minutes {max_minutes:g}: expected more than 0")
        forced = {Path(path): kind for path, kind in (kinds or {}).items()}
        entries: list[tuple[Path, str | None]] = []
        for entry in media:
            path, kind = (entry, None) if isinstance(entry, (str, Path)) else entry
            entries.append((Path(path), kind or forced.get(Path(path))))
        for path, kind in [*forced.items(), *entries]:
            if kind is not None and kind not in KINDS:
                raise InputError(f"{shown(path)}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        paths, each = tuple(path for path, _ in entries), tuple(kind for _, kind in entries)
        clip = cls(paths, each, [], [], [], [])
        clip._digests = None if sha256 is None else [bytes.fromhex(digest) for digest in sha256]
        limit_s = None if max_minutes is None else 60 * max_minutes
        try:
            for path, kind in entries:
                clip._add(path, kind, limit_s)
        except BaseException:
            clip.close()
            raise
        return clip

    def _add(self, path: Path, kind: str | None, limit_s: float | None) -> None:
        check_file(path)
        picture = sniff(path) if kind != "image" else "still"
        if picture == "still":
            if kind in ("video", "audio"):
                raise MediaError(f"{shown(path)}: a picture, expected {kind}; give it as --image")
            self.images.append(StillImage(path))
            return
        want = frozenset(("video", "audio") if kind is None else (kind,))
        found = scan(path, want, limit_s)
        video = None
        if found.video is not None:
            video = VideoTrack(found, found.video)
            self.videos.append(video)
            check_length(path, video.duration_s, limit_s)
        if found.audio is not None:
            audio = AudioTrack(found, found.audio)
            if audio.audible():
                self.audios.append(audio)
                check_length(path, audio.duration_s, limit_s)
            elif video is None:
                raise MediaError(f"{shown(path)}: its sound is empty (0 samples); record or export it again")
            else:
                self._notices.append(
                    f"{shown(path)}: its sound track is empty, taken as a video without sound"
                )

    @property
    def notices(self) -> list[str]:
        """What a user should know about the media; may grow as windows of a long clip are decoded."""
        return [*self._notices, *(notice for audio in self.audios for notice in audio.notices)]

    @property
    def duration_s(self) -> float:
        ends = [video.duration_s for video in self.videos] + [audio.duration_s for audio in self.audios]
        return max(ends, default=0.0)

    @cached_property
    def sha256(self) -> str:
        """Identity of the content: every file's bytes, order and forced kind. Computed on first use."""
        whole = hashlib.sha256()
        digests = self._digests or [_digest(path) for path in self.paths]
        for digest, kind in zip(digests, self._kinds, strict=True):
            whole.update(f"{kind or 'any'}:".encode() + digest)
        return whole.hexdigest()

    def windows(self, length_s: float = 10.0, stride_s: float | None = None) -> list[Window]:
        """The clip cut into windows of `length_s` that start `stride_s` (default: `length_s`) apart.

        A tail under 1 s belongs to the last one. At least one; with a smaller stride they overlap.
        """
        duration, stride = self.duration_s, length_s if stride_s is None else stride_s
        further = max(0, math.ceil((duration - _SHORTEST_TAIL_S - length_s) / stride - 1e-9))
        starts = [i * stride for i in range(further + 1)]
        ends = [start + length_s for start in starts[:-1]] + [duration]
        return [Window(start, end) for start, end in zip(starts, ends, strict=True)]

    def close(self) -> None:
        """Release the decoders. Tracks open them again when they are asked for more."""
        for video in self.videos:
            video.close()
        for audio in self.audios:
            audio.close()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise MediaError(
            f"{shown(path)}: can't be read any more ({error.strerror}); open it again"
        ) from error
    return digest.digest()

"""A video with results burnt in: read, drawn on and written frame by frame, its sound kept as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from crab_edge_apps._draw.overlay import Overlay, Picture
from crab_edge_apps._draw.results import shown as results_of
from crab_edge_apps._sinks.files import unfinished_file

from crab_edge.errors import CrabError, MediaError
from crab_edge.media_io import damage, is_cover, open_container, reason, shown
from crab_edge.results import Event

# Sound that MP4 carries and browsers play as it is; other sound is encoded again.
_KEPT_SOUND = {"aac", "mp3", "mp3float", "opus", "libopus", "flac"}
_ENCODERS = {"video": "libx264", "audio": "aac"}
_QUALITY = {"crf": "20", "preset": "veryfast"}
_FINEST = Fraction(1, 90_000)
"""Finest time base written: the usual one of video."""
_BT709, _LIMITED_RANGE = 1, 1


def annotate_video(
    clip_path: str | Path,
    answers: Iterable[Any],
    out_path: str | Path,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Writes `out_path` (H.264 and the clip's sound in MP4): the video with the answers drawn on it.

    answers: `Answer`s, or rows or answers as JSON, all of this clip. progress: called with the share done,
    0 to 1; an error that it raises ends the work. Memory doesn't grow with the length. The file appears
    whole or not at all. MediaError for a file without a picture or a damaged one; CrabError when `out_path`
    can't be written.
    """
    source, out = Path(clip_path), Path(out_path)
    told = [one for answer in answers for one in results_of(answer)]
    with unfinished_file(out) as unfinished, open_container(source) as container:
        reader = _Reader(source, container)
        ends = [one.result.end_s for one in told if isinstance(one.result, Event)]
        length_s = reader.duration_s or max(ends, default=0.0)
        overlay: Overlay | None = None
        with _Writer(unfinished, out, reader) as writer:
            for entry in reader:
                if not isinstance(entry, tuple):
                    writer.sound(entry)
                    continue
                ticks, picture = entry
                if overlay is None:
                    overlay = Overlay(picture.shape[1], picture.shape[0], told, length_s)
                time_s = float(ticks * reader.base)
                overlay.draw(picture, time_s)
                writer.picture(ticks, picture)
                if progress is not None and length_s:
                    progress(min(1.0, time_s / length_s))
            if overlay is None:
                raise MediaError(f"{shown(source)}: no picture of its video can be decoded; get a whole copy")
    if progress is not None:
        progress(1.0)
    return out


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise CrabError(
            f"{shown(out)}: can't be written ({reason(error)}); make room, or choose another place"
        ) from error


class _Reader:
    """A container's pictures and sound in the order of the file, times counted from the clip's start."""

    def __init__(self, source: Path, container: Any) -> None:
        self._source, self._container = source, container
        video = _stream(container, "video")
        if video is None:
            raise MediaError(f"{shown(source)}: no picture to draw on; its events fit SRT, VTT or CSV")
        video.thread_type = "AUTO"
        self.video, self.audio = video, _stream(container, "audio")
        self.rate = Fraction(video.average_rate or video.guessed_rate or 25)
        self.origin = Fraction(container.start_time or 0, 1_000_000)
        self.duration_s = container.duration / 1e6 if container.duration else 0.0
        # Ticks of the pictures written.
        self.base = max(Fraction(video.time_base), _FINEST)
        self.quarter_turns = 0
        self.lasts = 0
        """Ticks that the picture given last is on show, 0 if the file doesn't say."""
        self._last = -1

    def __iter__(self) -> Iterator[tuple[int, Picture] | Any]:
        """(ticks, uint8 [H, W, 3] to draw on) for a picture, a packet for sound."""
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        with damage(self._source, "its video can't be decoded"):
            for packet in self._container.demux(*streams):
                if packet.stream_index != self.video.index:
                    yield packet
                    continue
                for frame in packet.decode():
                    ticks = self._ticks(frame)
                    if ticks > self._last:
                        self._last = ticks
                        self.lasts = round((frame.duration or 0) * Fraction(frame.time_base) / self.base)
                        yield ticks, self._picture(frame)

    def _ticks(self, frame: Any) -> int:
        if frame.pts is None:
            return 0 if self._last < 0 else self._last + max(1, round(1 / self.rate / self.base))
        return round((frame.pts * Fraction(frame.time_base) - self.origin) / self.base)

    def _picture(self, frame: Any) -> Picture:
        rgb = frame.to_ndarray(format="rgb24")
        self.quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
        rgb = np.rot90(rgb, self.quarter_turns)
        height, width = rgb.shape[:2]
        # The encoder takes even sizes only: the last row or column is shown twice.
        rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return np.require(rgb, requirements=["C", "W"])


def _stream(container: Any, kind: str) -> Any:
    """The stream that a `Clip` would take; None if there is none that can be decoded."""
    found = [s for s in container.streams if s.type == kind and not (kind == "video" and is_cover(s))]
    best = container.streams.best(kind)
    chosen = next((s for s in found if best is not None and s.index == best.index), None)
    chosen = chosen or next(iter(found), None)
    return chosen if chosen is not None and chosen.codec_context is not None else None


class _Writer:
    """The MP4: pictures encoded, sound copied where MP4 takes it, else encoded as AAC."""

    def __init__(self, path: Path, out: Path, reader: _Reader) -> None:
        import av

        self._out, self._reader = out, reader
        self._waiting: list[Any] = []
        self._video: Any = None
        self._audio: Any = None
        self._copied = False
        self._lasts: dict[int, int] = {}
        with _writing(out):
            self._file: Any = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # What is wrong is known; closing may fail for the same reason.
            try:
                self._file.close()
            except Exception:
                pass
            return
        with _writing(self._out):
            if self._video is not None:
                self._mux(None)
            if self._audio is not None and not self._copied:
                self._file.mux(self._audio.encode(None))
            self._file.close()

    def picture(self, ticks: int, picture: Picture) -> None:
        """Encodes one picture uint8 [H, W, 3]."""
        import av

        if self._video is None:
            self._open(picture)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
        frame.pts, frame.time_base = ticks, self._reader.base
        self._lasts[ticks] = self._reader.lasts
        with _writing(self._out):
            self._mux(frame)
        waiting, self._waiting = self._waiting, []
        for packet in waiting:
            self.sound(packet)

    def _mux(self, frame: Any) -> None:
        for packet in self._video.encode(frame):
            # The encoder forgets how long a picture lasts; of the last one it makes a difference.
            packet.duration = self._lasts.pop(packet.pts, 0)
            self._file.mux(packet)

    def sound(self, packet: Any) -> None:
        """Takes one packet of the sound; those before the first picture wait for it to open the file."""
        import av

        if self._video is None:
            self._waiting.append(packet)
            return
        shift = round(self._reader.origin / packet.time_base)
        if self._copied:
            if packet.size and packet.dts is not None:
                packet.pts = None if packet.pts is None else packet.pts - shift
                packet.dts -= shift
                packet.stream = self._audio
                with _writing(self._out):
                    self._file.mux(packet)
            return
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, EOFError):
            return  # analysis leaves damaged sound packets out too
        for frame in frames:
            if frame.pts is not None:
                frame.pts -= round(self._reader.origin / frame.time_base)
            with _writing(self._out):
                self._file.mux(self._audio.encode(frame))

    def _open(self, picture: Picture) -> None:
        reader = self._reader
        with _writing(self._out):
            video = self._file.add_stream(_ENCODERS["video"], rate=reader.rate, options=_QUALITY)
            video.height, video.width = picture.shape[:2]
            video.pix_fmt = "yuv420p"
            codec = video.codec_context
            codec.time_base, codec.colorspace, codec.color_range = reader.base, _BT709, _LIMITED_RANGE
            aspect = reader.video.sample_aspect_ratio
            if aspect:
                codec.sample_aspect_ratio = 1 / aspect if reader.quarter_turns % 2 else aspect
            if reader.audio is not None:
                self._copied = reader.audio.codec_context.name in _KEPT_SOUND
                if self._copied:
                    self._audio = self._file.add_stream_from_template(reader.audio)
                else:
                    rate = reader.audio.codec_context.sample_rate
                    self._audio = self._file.add_stream(_ENCODERS["audio"], rate=min(rate, 48_000))
            self._video = video

"""Video tracks: frames by their place in time, decoded once. Used by `crab_edge.clip` alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import MediaError
from crab_edge.media_image import stretch
from crab_edge.media_io import Scan, StreamScan, Window, damage, open_container, shown, stream_at

# 150 kB each: the frames of some fifty windows, however long the clip.
_KEPT_FRAMES = 512
# A seek costs about as much as decoding so many frames.
_SEEK_GAIN = 12


class _Mismatch(Exception):
    """The packets' times didn't foretell the decoder's frames."""


class VideoTrack:
    """The picture stream of one file.

    path; width, height: pixels as shown (rotation applied); fps: mean frame rate; n_frames; duration_s: end
    of the last frame in the clip's seconds.
    """

    def __init__(self, scan: Scan, stream: StreamScan) -> None:
        self.path = scan.path
        self._scan, self._stream = scan, stream
        self._cache: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._ordinal = not stream.trusted
        base = float(stream.time_base)
        self._times = stream.pts * base - scan.origin_s
        self._end = stream.end * base - scan.origin_s
        if self._ordinal:
            self._count_by_decoding()
        self._reader = _FrameReader(scan, stream, self._ordinal)
        first = self._reader.first()
        if first is None or not self._times.size:
            raise MediaError(f"{shown(self.path)}: no picture of its video can be decoded; get a whole copy")
        quarter_turned = _quarter_turns(first) % 2
        self.width = first.height if quarter_turned else first.width
        self.height = first.width if quarter_turned else first.height

    @property
    def n_frames(self) -> int:
        return int(self._times.size)

    @property
    def duration_s(self) -> float:
        return float(max(self._end, self._times[-1]))

    @property
    def fps(self) -> float:
        span = self.duration_s - float(self._times[0])
        return self.n_frames / span if span > 0 else 0.0

    def visible(self, window: Window | None = None) -> bool:
        """Whether the track shows anything in the window; False where it has ended."""
        return self._inside(window).size > 0

    def frames(self, n: int, window: Window | None = None) -> NDArray[np.uint8]:
        """uint8 [n, 224, 224, 3] RGB: n frames evenly from the first to the last of the window (Crab+
        reference).

        Frames repeat where the window has fewer than n. MediaError if it has none or one is damaged.
        """
        self.prefetch([(n, window)])
        chosen = self._choose(n, window)  # again: the prefetch may have found the true number of frames
        return np.stack([self._cache[i] for i in chosen])

    def prefetch(self, requests: Iterable[tuple[int, Window | None]]) -> None:
        """Decode, in one pass, the frames of several (n, window) requests."""
        requests = list(requests)
        for _ in range(2):
            chosen = sorted({i for n, window in requests for i in self._choose(n, window)})
            try:
                self._load(chosen)
                break
            except _Mismatch:
                self._reader.close()
                self._ordinal = True
                self._cache.clear()
                self._count_by_decoding()
                self._reader = _FrameReader(self._scan, self._stream, ordinal=True)
        else:
            raise MediaError(
                f"{shown(self.path)}: its frames decode differently each time; convert it to mp4"
            )
        for i in chosen:
            self._cache.move_to_end(i)
        while len(self._cache) > max(_KEPT_FRAMES, len(chosen)):
            self._cache.popitem(last=False)

    def close(self) -> None:
        """Release the decoder; it opens again when needed."""
        self._reader.close()

    def _inside(self, window: Window | None) -> NDArray[np.int64]:
        """Indices of the frames that begin in the window, else of the one on show there."""
        if window is None:
            return np.arange(self._times.size)
        first = 0 if window.start_s <= 0 else int(np.searchsorted(self._times, window.start_s - 1e-6))
        last = int(np.searchsorted(self._times, window.end_s - 1e-6))
        if first == last and window.start_s < self.duration_s:
            first = max(0, first - 1)
            last = first + 1
        return np.arange(first, max(first, last))

    def _choose(self, n: int, window: Window | None) -> list[int]:
        inside = self._inside(window)
        if not inside.size:
            assert window is not None
            raise MediaError(
                f"{shown(self.path)}: no picture between {window.start_s:g} and {window.end_s:g} s, "
                f"the video ends at {self.duration_s:.1f} s; ask for a window before that"
            )
        return [int(inside[i]) for i in np.round(np.linspace(0, inside.size - 1, n)).astype(int)]

    def _load(self, chosen: list[int]) -> None:
        missing = [i for i in chosen if i not in self._cache]
        if not missing:
            return
        try:
            for i in missing:
                key = i if self._ordinal else int(self._stream.pts[i])
                frame = self._reader.read(key)
                with damage(self.path, "its colours can't be converted"):
                    self._cache[i] = _picture(frame)
        finally:
            # Where a seek can find the place again, an idle decoder would only hold memory.
            if not self._reader.sequential:
                self._reader.close()

    def _count_by_decoding(self) -> None:
        """The frames' true times, for streams whose packets don't tell them."""
        reader = _FrameReader(self._scan, self._stream, ordinal=True)
        times: list[float | None] = []
        interlaced = False
        try:
            for frame in reader.all():
                times.append(None if frame.pts is None else frame.time - self._scan.origin_s)
                interlaced = interlaced or frame.interlaced_frame
            rate = reader.rate
        finally:
            reader.close()
        packets = self._stream.packets // (2 if interlaced else 1)  # two fields may come in two packets
        if len(times) < 0.9 * packets and self._stream.codec not in ("vp8", "libvpx"):
            raise MediaError(
                f"{shown(self.path)}: only {len(times)} of {packets} frames can be decoded; get a whole copy"
            )
        known = [i / rate if t is None else t for i, t in enumerate(times)]
        self._times = np.maximum.accumulate(np.array(known, np.float64)) if known else np.zeros(0)
        if known:
            self._end = max(self._end, float(self._times[-1]) + 1 / rate)


class _FrameReader:
    """A decoder that moves forward, and back or far ahead by seeking to keyframes.

    `ordinal`: frames are known by their number from the start, not by time; then nothing can be sought.
    """

    def __init__(self, scan: Scan, stream: StreamScan, ordinal: bool) -> None:
        self._scan, self._stream, self._ordinal = scan, stream, ordinal
        self.sequential = ordinal or stream.keyframes.size == 0
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._next = 0  # index of the frame that comes next
        self._held: Any = None  # the frame decoded last
        self.rate = 25.0

    def close(self) -> None:
        self._held = None
        self._frames = iter(())
        if self._container is not None:
            self._container.close()
            self._container = None

    def first(self) -> Any:
        """The first frame, None if there is none; it stays current for `read`."""
        self._open()
        frame = next(self._frames, None)
        self._held = frame
        return frame

    def all(self) -> Iterator[Any]:
        """All frames from the start."""
        self._open()
        return self._frames

    def read(self, key: int) -> Any:
        """The frame with this presentation time (or number). _Mismatch if the stream passes over it."""
        self._approach(key)
        if self._held is not None and self._key(self._held) == key:
            return self._held
        for frame in self._frames:
            self._held = frame
            found = self._key(frame)
            if found == key:
                return frame
            if found is None or found > key:
                break
        if self._ordinal:
            raise MediaError(f"{shown(self._scan.path)}: ends before its frame {key}; get a whole copy")
        if not self.sequential:
            self.sequential = True  # the seek landed behind the frame: once more from the start
            self.close()
            return self.read(key)
        raise _Mismatch

    def _key(self, frame: Any) -> int | None:
        return self._next - 1 if self._ordinal else frame.pts

    def _approach(self, key: int) -> None:
        """Open, rewind or seek if that is needed or saves decoding."""
        current = None if self._held is None else self._key(self._held)
        behind = self._container is None or (current is not None and current > key)
        if self.sequential:
            if behind:
                self._open()
            return
        keys, pts = self._stream.keyframes, self._stream.pts
        place = int(np.searchsorted(keys, key, side="right")) - 1
        if place < 0:
            if behind:
                self._open()
            return
        # Containers without an index may land later than asked; from one keyframe further back they don't.
        start = int(keys[place if self._scan.seekable else max(0, place - 1)])
        here = int(pts[0]) if behind or current is None else current
        saved = int(np.searchsorted(pts, start) - np.searchsorted(pts, here, side="right"))
        if behind and (self._container is None or saved <= _SEEK_GAIN):
            self._open()
        if saved > _SEEK_GAIN:
            self._seek(start)

    def _open(self) -> None:
        self.close()
        self._container = open_container(self._scan.path)
        stream = stream_at(self._container, self._stream.index, self._scan.path)
        stream.thread_type = "AUTO"
        self.rate = float(stream.average_rate or stream.guessed_rate or 25)
        self._next = 0
        self._frames = self._decode(stream)

    def _seek(self, pts: int) -> None:
        import av

        stream = stream_at(self._container, self._stream.index, self._scan.path)
        try:
            self._container.seek(pts, stream=stream, backward=True)
        except av.error.FFmpegError:
            self.sequential = True
            self._open()
            return
        self._held = None
        self._frames = self._decode(stream, sought=True)

    def _decode(self, stream: Any, sought: bool = False) -> Iterator[Any]:
        """Frames from here on; after a seek from the next keyframe on, since decoders make up the rest."""
        with damage(self._scan.path, "its video can't be decoded"):
            for packet in self._container.demux(stream):
                if sought and packet.size and not packet.is_keyframe:
                    continue
                sought = False
                for frame in packet.decode():
                    self._next += 1
                    yield frame


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that the display matrix asks for."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _picture(frame: Any) -> NDArray[np.uint8]:
    from PIL import Image

    rgb = frame.to_ndarray(format="rgb24")
    turns = _quarter_turns(frame)
    if turns:
        rgb = np.ascontiguousarray(np.rot90(rgb, turns))
    return stretch(Image.fromarray(rgb))

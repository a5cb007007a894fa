"""Opening media containers and listing what they hold, without decoding. Used by `crab_edge.clip` alone.

A scan reads every packet once: it gives the timestamps of all frames at the price of reading the file, and
finds files that end before they should.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import InputError, MediaError

# Playlists reach for other files, and text shown as a picture isn't anybody's clip. FFmpeg waits for ever for
# the parts of some playlists, so those are known by their first bytes, before it sees them.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<svg", b"v=0")
_REFUSED_FORMATS = {"tty", "bin", "adf", "idf", "xbin", "hls", "dash", "concat", "sdp", "rawvideo", "data"}
# Containers whose header says how long they are; elsewhere the declared duration is an estimate.
_HONEST_FORMATS = {"mov", "mp4", "matroska", "webm", "wav", "flac"}
# Containers in which a seek lands where the timestamps say.
SEEKABLE_FORMATS = {"mov", "mp4", "matroska", "webm", "wav", "flac"}


@dataclass(frozen=True)
class Window:
    """A stretch of a clip in seconds, end exclusive."""

    start_s: float
    end_s: float


def shown(path: Path) -> str:
    """The path as messages print it: on one line."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def check_file(path: Path) -> None:
    """MediaError unless the path is a readable, non-empty file of bytes."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise MediaError(f"{shown(path)}: no such file; check the path") from None
    except OSError as error:
        raise MediaError(f"{shown(path)}: can't be read ({error.strerror}); check the path") from error
    if stat.S_ISDIR(info.st_mode):
        raise MediaError(
            f"{shown(path)}: a directory, expected one media file; use `crab-edge analyze` for folders"
        )
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(f"{shown(path)}: not a regular file; save it to disk first")
    if info.st_size == 0:
        raise MediaError(f"{shown(path)}: the file is empty (0 bytes); copy or record it again")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise MediaError(f"{shown(path)}: can't be read ({error.strerror}); check its permissions") from error
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_PLAYLISTS):
        raise MediaError(f"{shown(path)}: a text or playlist, not a media file; give the media it names")


def reason(error: Exception) -> str:
    """FFmpeg's words for an error, without its number and the path."""
    return str(getattr(error, "strerror", None) or error).rstrip(".")


@contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Turn FFmpeg's errors into a MediaError about this file."""
    import av

    try:
        yield
    except (av.error.FFmpegError, EOFError) as error:
        raise MediaError(
            f"{shown(path)}: {what} ({reason(error)}); the file is damaged or truncated: get a whole copy"
        ) from error


def open_container(path: Path) -> Any:
    """An open PyAV input container. MediaError if FFmpeg doesn't know the format."""
    import av

    try:
        # "file:" keeps names like "a:b.mp4" from being read as a protocol; nothing else may be opened.
        container = av.open("file:" + str(path.absolute()), options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, EOFError, UnicodeError, ValueError) as error:
        raise MediaError(
            f"{shown(path)}: not a media file, or the end of it is missing ({reason(error)}); "
            "expected a whole video, sound or picture file"
        ) from error
    names = set(container.format.name.split(","))
    refusal = None
    if names & _REFUSED_FORMATS:
        refusal = f"not a media file (looks like {container.format.name}); give a video, sound or picture"
    elif "image2" in names or any(name.endswith("_pipe") for name in names):
        refusal = f"a picture format that isn't supported ({container.format.name}); save it as PNG or JPEG"
    if refusal:
        container.close()
        raise MediaError(f"{shown(path)}: {refusal}")
    return container


def stream_at(container: Any, index: int, path: Path) -> Any:
    """A stream by number. In damaged files FFmpeg may find fewer streams the second time."""
    try:
        return container.streams[index]
    except IndexError:
        raise MediaError(
            f"{shown(path)}: its stream {index} can't be found again; get a whole copy"
        ) from None


@dataclass(frozen=True)
class StreamScan:
    """One stream's packets: presentation times in units of `time_base`, sorted, those before the first
    keyframe left out.

    `trusted`: every packet has its own time, so one packet is one frame. `end` is where the last packet ends.
    """

    index: int
    codec: str
    time_base: Fraction
    pts: NDArray[np.int64]
    keyframes: NDArray[np.int64]
    end: int
    packets: int
    trusted: bool


@dataclass(frozen=True)
class Scan:
    """What a container holds. `origin_s` is the container's time that counts as the clip's zero."""

    path: Path
    format: frozenset[str]
    origin_s: float
    video: StreamScan | None
    audio: StreamScan | None

    @property
    def seekable(self) -> bool:
        return bool(self.format & SEEKABLE_FORMATS)


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a picture attached to a recording."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def scan(path: Path, want: frozenset[str], limit_s: float | None) -> Scan:
    """List the best picture and sound stream of a container.

    want: of "video", "audio"; limit_s: the longest duration allowed. Raises MediaError for what isn't media,
    has no decoder or ends too early; InputError beyond the limit.
    """
    with open_container(path) as container:
        declared = container.duration / 1e6 if container.duration else None
        check_length(path, declared, limit_s)
        video = _best(container, "video") if "video" in want else None
        audio = _best(container, "audio") if "audio" in want else None
        if video is None and audio is None:
            kinds = " or ".join(sorted(want, reverse=True))
            raise MediaError(f"{shown(path)}: holds no {kinds} stream; give a file that does")
        for stream in (video, audio):
            if stream is not None and stream.codec_context is None:
                other = "--audio" if stream is video else "--video"
                raise MediaError(
                    f"{shown(path)}: no decoder for its {stream.type} stream; convert it, "
                    f"or give it as {other} to use the rest alone"
                )
        lists = {
            s.index: _PacketList(s) for s in container.streams if s.type in ("video", "audio", "subtitle")
        }
        with damage(path, "its packets can't be read to the end"):
            for packet in container.demux(*[stream_at(container, i, path) for i in lists]):
                if packet.size:
                    lists[packet.stream_index].add(packet)
        formats = frozenset(container.format.name.split(","))
        for stream in (video, audio):
            if stream is not None and lists[stream.index].encrypted:
                raise MediaError(
                    f"{shown(path)}: its {stream.type} stream is encrypted (DRM), which can't be decoded; "
                    "give a copy without protection"
                )
        origin = container.start_time / 1e6 if container.start_time is not None else 0.0
        if formats & _HONEST_FORMATS:
            _check_complete(path, list(lists.values()), origin, declared)
        return Scan(
            path=path,
            format=formats,
            origin_s=origin,
            video=lists[video.index].done() if video is not None else None,
            audio=lists[audio.index].done() if audio is not None else None,
        )


def check_length(path: Path, duration_s: float | None, limit_s: float | None) -> None:
    """InputError if a medium is longer than allowed."""
    if limit_s is not None and duration_s is not None and duration_s > limit_s + 0.5:
        raise InputError(
            f"{shown(path)}: {duration_s / 60:.1f} minutes long, expected at most {limit_s / 60:g}; "
            "use `crab-edge analyze` for long media, or raise --max-minutes"
        )


def _best(container: Any, kind: str) -> Any:
    candidates = [s for s in container.streams if s.type == kind and not (kind == "video" and is_cover(s))]
    best = container.streams.best(kind)
    if best is not None and any(s.index == best.index for s in candidates):
        return best
    return candidates[0] if candidates else None


class _PacketList:
    """Collects one stream's packets."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.base = Fraction(stream.time_base or Fraction(1, 1000))
        self.pts = array("q")
        self.keyframes = array("q")
        self.packets = self.timeless = self.corrupt = 0
        self.end: int | None = None
        self.encrypted = False

    def add(self, packet: Any) -> None:
        self.encrypted = self.encrypted or packet.has_sidedata("encryption_info")
        if packet.is_corrupt:
            self.corrupt += 1
        if packet.is_discard:  # outside the edit list: decoded, never shown
            if packet.is_keyframe and packet.pts is not None:
                self.keyframes.append(packet.pts)
            return
        if not (self.keyframes or packet.is_keyframe):
            return
        self.packets += 1
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.pts is None:
            self.timeless += 1
        else:
            self.pts.append(packet.pts)
            if packet.is_keyframe:
                self.keyframes.append(packet.pts)
        if time is not None:
            self.end = max(time + int(packet.duration or 0), self.end if self.end is not None else time)

    def end_s(self) -> float | None:
        return None if self.end is None else float(self.end * self.base)

    def done(self) -> StreamScan:
        pts = np.unique(np.frombuffer(self.pts, np.int64)) if self.pts else np.zeros(0, np.int64)
        keys = np.unique(np.frombuffer(self.keyframes, np.int64)) if self.keyframes else np.zeros(0, np.int64)
        codec = self.stream.codec_context.name
        # VP8 stores reference frames that are never shown as packets of their own.
        trusted = self.timeless == 0 and pts.size == self.packets and codec not in ("vp8", "libvpx")
        return StreamScan(
            index=self.stream.index,
            codec=codec,
            time_base=self.base,
            pts=pts,
            keyframes=keys,
            end=self.end if self.end is not None else 0,
            packets=self.packets,
            trusted=trusted,
        )


def _check_complete(path: Path, lists: list[_PacketList], origin: float, declared: float | None) -> None:
    """MediaError if packets are cut off or end long before the declared end."""
    for packets in lists:
        if packets.corrupt:
            raise MediaError(
                f"{shown(path)}: truncated inside its {packets.stream.type} stream; get a whole copy"
            )
    ends = [end for end in (packets.end_s() for packets in lists) if end is not None]
    if declared and ends and declared - (max(ends) - origin) > max(0.5, 0.02 * declared):
        raise MediaError(
            f"{shown(path)}: truncated: it declares {declared:.1f} s and ends after "
            f"{max(ends) - origin:.1f} s; get a whole copy"
        )

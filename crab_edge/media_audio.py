"""Sound tracks as 16 kHz mono. Used by `crab_edge.clip` alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import MediaError
from crab_edge.media_io import Scan, StreamScan, Window, open_container, reason, shown, stream_at

SAMPLE_RATE = 16000
# Up to this the track is decoded and resampled once as a whole, which is what the reference does; beyond it,
# by window.
_WHOLE_S = 120.0
# Timestamps jitter by less than this; more is a gap in the recording.
_GAP_S = 0.05
# What the resampler may need to hear around a window, and the decoder before it.
_MARGIN_S = 0.25
_PREROLL_S = 1.0
# Decoded samples that stay, in the file's own rate: the longest window and its margins.
_KEPT_S = 12.0
_WORTH_SEEKING_S = 30.0
# A window with less than this of the track counts as one without sound.
_AUDIBLE_S = 0.1


class AudioTrack:
    """The sound stream of one file.

    path; duration_s: end of the sound in the clip's seconds; sample_rate: the file's own, in Hz; notices.
    Resampling as the reference's loader: channels averaged, then soxr at high quality.
    """

    def __init__(self, scan: Scan, stream: StreamScan) -> None:
        self.path = scan.path
        self.notices: list[str] = []
        self._scan = scan
        self._reader = _SoundReader(scan, stream, self.notices)
        self._whole: NDArray[np.float32] | None = None
        self._last: tuple[tuple[int, int], NDArray[np.float32]] | None = None
        estimate = stream.end * float(stream.time_base) - scan.origin_s
        if not self._reader.start():
            self.duration_s = 0.0
            self._whole = np.zeros(0, np.float32)
        elif estimate <= _WHOLE_S:
            native = self._reader.read(0, None)
            self.duration_s = native.size / self._reader.rate
            self._whole = _resample(native, self._reader.rate)
            self._whole.flags.writeable = False
            self.close()
        else:
            self.duration_s = estimate
        self.sample_rate = self._reader.rate

    def audible(self, window: Window | None = None) -> bool:
        """Whether the window holds at least 0.1 s of the track (all of it: any sample)."""
        if window is None:
            return self.duration_s > 0
        return min(window.end_s, self.duration_s) - max(0.0, window.start_s) >= min(
            _AUDIBLE_S, self.duration_s
        )

    def waveform(self, window: Window | None = None) -> NDArray[np.float32]:
        """float32 [n], mono at 16 kHz, nominally in -1..1; what is shorter than 1 s is followed by zeros up
        to 1 s.

        MediaError if the window lies behind the end of the track, or the sound can't be decoded.
        """
        if not self.audible(window):
            where = "" if window is None else f" between {window.start_s:g} and {window.end_s:g} s"
            raise MediaError(
                f"{shown(self.path)}: no sound{where}, the track ends at {self.duration_s:.1f} s; "
                "ask for a window before that"
            )
        start = 0 if window is None else max(0, round(window.start_s * SAMPLE_RATE))
        stop = None if window is None else round(window.end_s * SAMPLE_RATE)
        if self._whole is not None:
            wave = self._whole[start:stop]
        else:
            wave = self._decode(start, stop if stop is not None else math.ceil(self.duration_s * SAMPLE_RATE))
        if wave.size < SAMPLE_RATE:
            wave = np.concatenate([wave, np.zeros(SAMPLE_RATE - wave.size, np.float32)])
        return wave

    def close(self) -> None:
        """Release the decoder; it opens again when needed."""
        self._last = None
        self._reader.close()

    def _decode(self, start: int, stop: int) -> NDArray[np.float32]:
        """A stretch of the resampled track; start and stop count samples at 16 kHz.

        The last one is kept, since several tasks ask for it.
        """
        if self._last is not None and self._last[0] == (start, stop):
            return self._last[1]
        self._last = None
        rate = self._reader.rate
        # Both rates share instants every `step` (file) and `unit` (16 kHz) samples; cuts are made there.
        common = math.gcd(rate, SAMPLE_RATE)
        step, unit = rate // common, SAMPLE_RATE // common
        margin = math.ceil(_MARGIN_S * common)
        first = max(0, start // unit - margin)
        last = -(-stop // unit) + margin
        wave = _resample(self._reader.read(first * step, last * step), rate)
        stretch = wave[start - first * unit : stop - first * unit].copy()
        stretch.flags.writeable = False
        self._last = (start, stop), stretch
        return stretch


def _resample(wave: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """float32 [n] at `rate` -> float32 [ceil(n * 16000 / rate)]."""
    if rate == SAMPLE_RATE:
        return wave
    import soxr

    length = -(-wave.size * SAMPLE_RATE // rate)
    out = np.asarray(soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ"), np.float32)[:length]
    return np.concatenate([out, np.zeros(length - out.size, np.float32)]) if out.size < length else out


class _SoundReader:
    """A decoder of mono samples on the clip's time line, moving forward; `start` finds `rate` (Hz)."""

    def __init__(self, scan: Scan, stream: StreamScan, notices: list[str]) -> None:
        self._scan, self._stream, self._notices = scan, stream, notices
        self._container: Any = None
        self._blocks: Iterator[tuple[int, NDArray[np.float32]]] = iter(())
        self._kept: list[tuple[int, NDArray[np.float32]]] = []
        self._kept_from = 0
        self._position = 0
        self._noted: set[str] = set()
        self.rate = SAMPLE_RATE

    def start(self) -> bool:
        """Decode the first samples; False if the track has none."""
        self._open()
        return self._advance()

    def close(self) -> None:
        self._blocks = iter(())
        self._kept = []
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self, start: int, stop: int | None) -> NDArray[np.float32]:
        """float32 mono samples start..stop at `rate`, fewer at the track's end; recording gaps are silent."""
        if self._container is None or start < self._kept_from:
            self._open()
        ahead = start - self._position
        if self._scan.seekable and ahead > _WORTH_SEEKING_S * self.rate:
            self._seek(start)
        while stop is None or self._position < stop:
            if not self._advance():
                break
            if self._position <= start:  # nothing of it is wanted
                self._kept.clear()
                self._kept_from = self._position
        end = self._position if stop is None else min(stop, self._position)
        out = np.zeros(max(0, end - start), np.float32)
        for place, block in self._kept:
            low, high = max(place, start), min(place + block.size, end)
            if low < high:
                out[low - start : high - start] = block[low - place : high - place]
        keep = end - round(_KEPT_S * self.rate)  # the next window may overlap this one
        while self._kept and self._kept[0][0] + self._kept[0][1].size < keep:
            place, block = self._kept.pop(0)
            self._kept_from = place + block.size
        return out

    def _advance(self) -> bool:
        item = next(self._blocks, None)
        if item is None:
            return False
        self._kept.append(item)
        self._position = item[0] + item[1].size
        return True

    def _open(self) -> None:
        self.close()
        self._container = open_container(self._scan.path)
        self._kept_from = self._position = 0
        self._blocks = self._decode(sought=False)

    def _seek(self, start: int) -> None:
        """Go to somewhat before a sample; to the track's start if the file doesn't lead there."""
        import av

        time_s = start / self.rate - _PREROLL_S + self._scan.origin_s
        stream = stream_at(self._container, self._stream.index, self._scan.path)
        try:
            self._container.seek(int(time_s / self._stream.time_base), stream=stream, backward=True)
        except av.error.FFmpegError:
            self._open()
            return
        self._kept = []
        self._blocks = self._decode(sought=True)
        if self._advance() and self._kept[0][0] <= start:
            self._kept_from = self._kept[0][0]
        else:
            self._open()

    def _decode(self, sought: bool) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first sample on the time line, samples) of frame after frame."""
        import av

        place: int | None = None if sought else 0
        bad = 0
        error: Exception | None = None
        origin = self._scan.origin_s
        stream = stream_at(self._container, self._stream.index, self._scan.path)
        packets = iter(self._container.demux(stream))
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except (av.error.FFmpegError, EOFError) as failure:
                bad, error = bad + 1, failure
                if bad > 3 + self._stream.packets // 50:
                    break
                continue
            for frame in frames:
                block = _mono(frame)
                self._check_rate(frame.sample_rate)
                true = None if frame.pts is None else max(0, round((frame.time - origin) * self.rate))
                if place is None:
                    if true is None:
                        return  # nothing says where the seek has led
                    place = true
                elif true is not None and true - place > _GAP_S * self.rate:
                    self._note_gap(place, true)
                    place = true
                yield place, block
                place += block.size
        if error is not None:
            self._judge_damage(bad, error, place)

    def _check_rate(self, rate: int) -> None:
        if not self._kept and self._position == 0:
            self.rate = rate
        elif rate != self.rate:
            raise MediaError(
                f"{shown(self._scan.path)}: its sample rate changes from {self.rate} to {rate} Hz; "
                "convert it to wav"
            )

    def _note_gap(self, place: int, true: int) -> None:
        self._note(
            "gap",
            f"its sound has gaps, one of {(true - place) / self.rate:.2f} s at {place / self.rate:.2f} s; "
            "they are heard as silence",
        )

    def _judge_damage(self, bad: int, error: Exception, place: int | None) -> None:
        if not place or bad > 3 + self._stream.packets // 50:
            raise MediaError(
                f"{shown(self._scan.path)}: its sound can't be decoded ({reason(error)}); get a whole copy"
            ) from error
        self._note("damage", f"{bad} damaged packets of its sound were left out")

    def _note(self, kind: str, text: str) -> None:
        """One notice of a kind, though a long track may be read in several passes."""
        if kind not in self._noted:
            self._noted.add(kind)
            self._notices.append(f"{shown(self._scan.path)}: {text}")


def _mono(frame: Any) -> NDArray[np.float32]:
    """A PyAV audio frame as float32 [samples], channels averaged."""
    samples = frame.to_ndarray()
    channels = frame.layout.nb_channels
    samples = samples.reshape(-1, channels).T if not frame.format.is_planar else samples
    if samples.dtype == np.uint8:
        values = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        values = (samples / float(-np.iinfo(samples.dtype).min)).astype(np.float32)
    else:
        values = samples.astype(np.float32)
    return values.mean(axis=0) if channels > 1 else np.ascontiguousarray(values[0])

"""A small SoundFont 2 player in numpy: enough of the format to render melodies of General MIDI instruments.

Zones, key and velocity ranges, tuning, loops, attenuation and the volume envelope follow the SoundFont 2.04
specification; filters, modulators and effects are left out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crab_edge.errors import MediaError

# Generators of the specification (section 8.1.2) that are used here.
START, END, LOOP_START, LOOP_END = 0, 1, 2, 3
START_COARSE, END_COARSE, LOOP_START_COARSE, LOOP_END_COARSE = 4, 12, 45, 50
DELAY, ATTACK, HOLD, DECAY, SUSTAIN, RELEASE = 33, 34, 35, 36, 37, 38
INSTRUMENT, KEY_RANGE, VELOCITY_RANGE, ATTENUATION = 41, 43, 44, 48
COARSE_TUNE, FINE_TUNE, SAMPLE_ID, SAMPLE_MODES, SCALE_TUNING, ROOT_KEY = 51, 52, 53, 54, 56, 58
_ADDED_BY_PRESET = (DELAY, ATTACK, HOLD, DECAY, SUSTAIN, RELEASE, ATTENUATION, COARSE_TUNE, FINE_TUNE)
_DEFAULTS = {
    DELAY: -12000,
    ATTACK: -12000,
    HOLD: -12000,
    DECAY: -12000,
    SUSTAIN: 0,
    RELEASE: -12000,
    ATTENUATION: 0,
    COARSE_TUNE: 0,
    FINE_TUNE: 0,
    SCALE_TUNING: 100,
    SAMPLE_MODES: 0,
}


@dataclass(frozen=True)
class _Sample:
    start: int
    end: int
    loop_start: int
    loop_end: int
    rate: int
    root: int
    correction: int


class SoundFont:
    """Reads the file's tables; samples stay mapped on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        chunks = _chunks(path)
        missing = [
            c for c in ("smpl", "phdr", "pbag", "pgen", "inst", "ibag", "igen", "shdr") if c not in chunks
        ]
        if missing:
            raise MediaError(
                f"{path}: not a SoundFont 2 file (no chunk {missing[0]}); download the package again"
            )
        offset, size = chunks["smpl"]
        self._wave = np.memmap(path, dtype="<i2", mode="r", offset=offset, shape=(size // 2,))

        def table(name: str, fmt: str) -> list[tuple]:
            with path.open("rb") as file:
                file.seek(chunks[name][0])
                return list(struct.iter_unpack(fmt, file.read(chunks[name][1])))

        self._presets = [(p[1], p[2], p[3]) for p in table("phdr", "<20sHHHIII")]
        self._preset_bags = [b[0] for b in table("pbag", "<HH")]
        self._preset_gens = table("pgen", "<Hh")
        self._instruments = [i[1] for i in table("inst", "<20sH")]
        self._instrument_bags = [b[0] for b in table("ibag", "<HH")]
        self._instrument_gens = table("igen", "<Hh")
        self._samples = [_Sample(*s[1:6], s[6], s[7]) for s in table("shdr", "<20sIIIIIBbHH")]

    def note(
        self, program: int, key: int, velocity: int, duration_s: float, rate: int, bank: int = 0
    ) -> np.ndarray:
        """One note with its release, float32 at `rate` Hz; empty where the preset has no zone for the key."""
        parts = [
            self._render(zone, key, velocity, duration_s, rate)
            for zone in self._zones(bank, program, key, velocity)
        ]
        parts = [p for p in parts if p.size]
        if not parts:
            return np.zeros(0, np.float32)
        mixed = np.zeros(max(p.size for p in parts), np.float32)
        for part in parts:
            mixed[: part.size] += part
        return mixed

    def _zones(self, bank: int, program: int, key: int, velocity: int) -> list[dict[int, int]]:
        index = next((i for i, p in enumerate(self._presets[:-1]) if p[0] == program and p[1] == bank), None)
        if index is None:
            raise MediaError(f"{self.path}: has no program {program} in bank {bank}")
        zones = []
        for preset in _layers(
            self._preset_bags,
            self._preset_gens,
            self._presets[index][2],
            self._presets[index + 1][2],
            INSTRUMENT,
        ):
            if not _covers(preset, key, velocity):
                continue
            number = preset[INSTRUMENT]
            for zone in _layers(
                self._instrument_bags,
                self._instrument_gens,
                self._instruments[number],
                self._instruments[number + 1],
                SAMPLE_ID,
            ):
                if _covers(zone, key, velocity):
                    merged = {**_DEFAULTS, **zone}
                    for generator in _ADDED_BY_PRESET:
                        merged[generator] += preset.get(generator, 0)
                    zones.append(merged)
        return zones

    def _render(
        self, zone: dict[int, int], key: int, velocity: int, duration_s: float, rate: int
    ) -> np.ndarray:
        sample = self._samples[zone[SAMPLE_ID]]
        start = sample.start + zone.get(START, 0) + 32768 * zone.get(START_COARSE, 0)
        end = sample.end + zone.get(END, 0) + 32768 * zone.get(END_COARSE, 0)
        loop_start = sample.loop_start + zone.get(LOOP_START, 0) + 32768 * zone.get(LOOP_START_COARSE, 0)
        loop_end = sample.loop_end + zone.get(LOOP_END, 0) + 32768 * zone.get(LOOP_END_COARSE, 0)
        root = zone[ROOT_KEY] if zone.get(ROOT_KEY, -1) >= 0 else sample.root
        cents = (
            (key - root) * zone[SCALE_TUNING] + 100 * zone[COARSE_TUNE] + zone[FINE_TUNE] + sample.correction
        )
        step = 2.0 ** (cents / 1200.0) * sample.rate / rate
        release = min(_seconds(zone[RELEASE]), 1.5)
        count = int((duration_s + release) * rate)
        position = np.arange(count) * step
        looped = zone[SAMPLE_MODES] & 3 in (1, 3) and loop_end - loop_start > 8
        if looped:
            inside = position >= loop_start - start
            position[inside] = (
                (position[inside] - (loop_start - start)) % (loop_end - loop_start) + loop_start - start
            )
        else:
            position = position[position < end - start - 2]
        data = self._wave[start:end].astype(np.float32) / 32768.0
        if data.size < 4 or position.size == 0:
            return np.zeros(0, np.float32)
        if step > 1.0:
            # A box filter as wide as one output step keeps most of the aliasing out.
            width = max(1, round(step))
            data = np.convolve(data, np.full(width, 1.0 / width, np.float32), mode="same")
        whole = np.minimum(position.astype(np.int64), data.size - 2)
        part = (position - whole).astype(np.float32)
        wave = data[whole] * (1 - part) + data[whole + 1] * part
        gain = 10.0 ** (-min(zone[ATTENUATION], 1440) * 0.4 / 200.0) * (velocity / 127.0) ** 2
        return (wave * _envelope(zone, duration_s, rate, wave.size) * gain).astype(np.float32)


def _seconds(timecents: int) -> float:
    return 0.0 if timecents <= -12000 else 2.0 ** (timecents / 1200.0)


def _envelope(zone: dict[int, int], duration_s: float, rate: int, count: int) -> np.ndarray:
    delay, attack, hold = _seconds(zone[DELAY]), max(_seconds(zone[ATTACK]), 0.002), _seconds(zone[HOLD])
    decay, release = max(_seconds(zone[DECAY]), 0.01), max(min(_seconds(zone[RELEASE]), 1.5), 0.03)
    t = np.arange(count, dtype=np.float32) / rate
    floor = min(max(zone[SUSTAIN], 0), 1000) / 10.0
    # The decay time is what 100 dB would take, so the slope is the same for every sustain level.
    down = np.clip((t - delay - attack - hold) / decay * 100.0, 0.0, floor)
    level = np.clip((t - delay) / attack, 0.0, 1.0) * 10.0 ** (-down / 20.0)
    tail = np.clip((t - duration_s) / release * 60.0, 0.0, 100.0)
    return level * 10.0 ** (-tail / 20.0)


def _covers(zone: dict[int, int], key: int, velocity: int) -> bool:
    for generator, value in ((KEY_RANGE, key), (VELOCITY_RANGE, velocity)):
        if generator in zone:
            low, high = zone[generator] & 0xFF, (zone[generator] >> 8) & 0xFF
            if not low <= value <= high:
                return False
    return True


def _layers(bags: list[int], gens: list[tuple], first: int, last: int, terminal: int) -> list[dict[int, int]]:
    """The zones of a preset or instrument; a first zone without the terminal generator is the global one."""
    common: dict[int, int] = {}
    layers = []
    for bag in range(first, last):
        zone = dict(gens[bags[bag] : bags[bag + 1]])
        if terminal in zone:
            layers.append({**common, **zone})
        elif bag == first:
            common = zone
    return layers


def _chunks(path: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:12] != b"sfbk":
            raise MediaError(f"{path}: not a SoundFont 2 file; download the package again")
        end = 8 + struct.unpack("<I", head[4:8])[0]
        at = 12
        while at + 8 <= end:
            file.seek(at)
            name, size = struct.unpack("<4sI", file.read(8))
            if name == b"LIST":
                at += 12
                continue
            found[name.decode("latin-1")] = (at + 8, size)
            at += 8 + size + size % 2
    return found


SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 7, 10))
# Keys where the instrument is at home; others play around middle C.
RANGES = {
    14: (60, 79),
    33: (28, 48),
    34: (28, 48),
    40: (62, 88),
    42: (40, 64),
    47: (40, 55),
    53: (53, 72),
    56: (58, 79),
    57: (45, 65),
    58: (32, 52),
    60: (45, 67),
    65: (55, 76),
    66: (50, 72),
    68: (60, 82),
    70: (40, 62),
    71: (55, 82),
    73: (65, 92),
    13: (65, 90),
    105: (50, 74),
    24: (45, 70),
    25: (45, 70),
}


def melody(
    font: SoundFont, program: int, seed: int, duration_s: float = 5.0, rate: int = 16000
) -> np.ndarray:
    """A random melody: scale, tempo, rhythm, register and chords come from `seed`; float32, peak 0.9."""
    random = np.random.default_rng([seed, program])
    low, high = RANGES.get(program, (52, 79))
    if program >= 120:
        effect = font.note(program, int(random.integers(50, 72)), 110, duration_s, rate)
        return _normalise(effect[: int(duration_s * rate)])
    scale = SCALES[int(random.integers(len(SCALES)))]
    tonic = int(random.integers(12))
    keys = [k for k in range(low, high + 1) if (k - tonic) % 12 in scale]
    beat = 60.0 / random.uniform(70, 170)
    polyphonic = program in (0, 1, 15, 19, 21, 22, 24, 25, 27, 29, 30, 46, 105)
    out = np.zeros(int((duration_s + 2) * rate), np.float32)
    at, place = 0.0, int(random.integers(len(keys)))
    while at < duration_s - 0.1:
        length = beat * float(random.choice([0.5, 1.0, 1.0, 1.5, 2.0]))
        place = int(np.clip(place + random.integers(-3, 4), 0, len(keys) - 1))
        if random.random() > 0.08:
            chord = [keys[place]]
            if polyphonic and random.random() < 0.4:
                chord += [keys[min(place + 2, len(keys) - 1)], keys[min(place + 4, len(keys) - 1)]]
            for key in chord:
                note = font.note(program, key, int(random.integers(70, 120)), length * 0.95, rate)
                begin = int(at * rate)
                note = note[: out.size - begin]
                out[begin : begin + note.size] += note
        at += length
    return _normalise(out[: int(duration_s * rate)])


def rhythm(
    font: SoundFont, keys: list[int], seed: int, duration_s: float = 5.0, rate: int = 16000
) -> np.ndarray:
    """A random pattern on keys of the General MIDI drum kit (bank 128); float32, peak 0.9."""
    random = np.random.default_rng([seed, *keys])
    step = 60.0 / random.uniform(80, 150) / 2
    pattern = random.random((len(keys), 8)) < random.uniform(0.25, 0.6)
    pattern[int(random.integers(len(keys))), 0] = True
    out = np.zeros(int((duration_s + 2) * rate), np.float32)
    for beat in range(int(duration_s / step)):
        for row, key in enumerate(keys):
            if pattern[row, beat % 8]:
                note = font.note(0, key, int(random.integers(70, 127)), step, rate, bank=128)
                begin = int(beat * step * rate)
                note = note[: out.size - begin]
                out[begin : begin + note.size] += note
    return _normalise(out[: int(duration_s * rate)])


def _normalise(wave: np.ndarray) -> np.ndarray:
    peak = float(np.abs(wave).max()) if wave.size else 0.0
    return (wave * (0.9 / peak)).astype(np.float32) if peak > 1e-6 else np.zeros_like(wave, np.float32)

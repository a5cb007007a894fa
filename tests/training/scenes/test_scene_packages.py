"""Unpacking, hold-outs, pictures and sounds, on files made here."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import tomllib
from PIL import Image

from crab_edge.errors import DependencyError, InputError, MediaError
from crab_edge.training.scenes import Catalogue, packages, pictures, sounds
from crab_edge.training.scenes.pack import Item, _pose_group, hold_out
from crab_edge.training.scenes.soundfont import SoundFont

RATE = 16000


def rcc(name: str, data: bytes, packed: bool) -> bytes:
    """A Qt resource bundle with one file in its root."""
    blob = struct.pack(">I", len(data)) + zlib.compress(data) if packed else data
    payload = struct.pack(">I", len(blob)) + blob
    names = struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHHHI", 0, int(packed), 0, 0, 0)
    start = 20
    head = b"qres" + struct.pack(">4I", 1, start, start + len(tree), start + len(tree) + len(payload))
    return head + tree + payload + names


@pytest.mark.parametrize("packed", [False, True])
def test_qt_bundle(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "a.rcc").write_bytes(rcc("dog.svg", b"<svg/>" * 50, packed))
    assert packages.unpack_rcc(tmp_path / "a.rcc", tmp_path / "out") == 1
    assert (tmp_path / "out/dog.svg").read_bytes() == b"<svg/>" * 50


def test_qt_bundle_refuses_what_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.rcc").write_bytes(rcc("../evil", b"x", False))
    with pytest.raises(MediaError, match="outside"):
        packages.unpack_rcc(tmp_path / "a.rcc", tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    (tmp_path / "b.rcc").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="not a Qt resource"):
        packages.unpack_rcc(tmp_path / "b.rcc", tmp_path / "out")


def test_sound_set(tmp_path: Path) -> None:
    title, sound = b'"Sheep". License: Creative Commons Zero 1.0.\0', b"RIFFdata"
    clip = bytes([len(title)]) + title + sound
    (tmp_path / "a.cat").write_bytes(struct.pack("<II", 8, len(sound)) + clip)
    assert packages.unpack_opensfx(tmp_path / "a.cat", tmp_path / "out") == 1
    assert (tmp_path / "out/00.wav").read_bytes() == sound
    assert "Creative Commons Zero" in (tmp_path / "out/credits.tsv").read_text()


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DependencyError, match="apt-get"):
        packages.fetch_packages(tmp_path)


def test_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="crab-edge scenes fetch"):
        Catalogue.load(tmp_path)


def test_patterns_match_whole_path_ends(tmp_path: Path) -> None:
    source = packages.Source(
        packages.PACKAGES[0], "1", tmp_path, ["a/cat.png", "a/bobcat.png", "b/cat.svg", "a/cat.ogg"]
    )
    assert source.match("cat", packages.PICTURE_SUFFIXES) == ["a/cat.png", "b/cat.svg"]
    assert source.match("a/cat", packages.PICTURE_SUFFIXES) == ["a/cat.png"]
    assert source.match("*cat", packages.SOUND_SUFFIXES) == ["a/cat.ogg"]


def test_class_table() -> None:
    text = resources.files("crab_edge.training.scenes").joinpath("classes.toml").read_text("utf-8")
    table = tomllib.loads(text)
    labels = [label for entries in table.values() for label in entries]
    assert len(labels) == len(set(labels)) and all(label == label.lower() for label in labels)
    assert sum(len(entries) for group, entries in table.items() if group != "silent") >= 90
    letters = {package.source for package in packages.PACKAGES}
    for entries in table.values():
        for entry in entries.values():
            for pattern in entry["pictures"] + entry.get("sounds", []):
                assert pattern.split(":", 1)[0] in letters


def test_hold_out_keeps_poses_together() -> None:
    items = [
        Item(f"s:dog{i}-{p}", np.zeros(1), _pose_group("s", f"Animals/dog{i}-{p}.png"))
        for i in (1, 2)
        for p in "ab"
    ]
    hold_out(items, "dog")
    by_group: dict[str, set[bool]] = {}
    for item in items:
        by_group.setdefault(item.group, set()).add(item.test)
    assert sorted(len(v) for v in by_group.values()) == [1, 1]
    assert {True, False} == set.union(*by_group.values())
    single = [Item("a", np.zeros(1), "a")]
    hold_out(single, "cat")
    assert not single[0].test


def test_cutouts(tmp_path: Path) -> None:
    picture = np.zeros((300, 500, 4), np.uint8)
    picture[100:200, 50:450] = (200, 30, 30, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    cutout = pictures.load_cutout(tmp_path / "a.png", opaque=True)
    assert cutout is not None and cutout.shape == (56, 224, 4)
    assert pictures.load_cutout(tmp_path / "a.png") is None
    (tmp_path / "b.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="210mm" height="297mm">'
        '<circle cx="90" cy="90" r="60" fill="#c00"/></svg>'
    )
    drawn = pictures.load_cutout(tmp_path / "b.svg")
    assert drawn is not None and abs(drawn.shape[0] - 224) < 8 and abs(drawn.shape[1] - 224) < 8
    assert not pictures.is_silhouette(drawn)
    black = drawn.copy()
    black[..., :3] = 0
    assert pictures.is_silhouette(black)
    look = pictures.thumbnail(drawn)
    assert pictures.difference(look, look[:, ::-1]) == 0.0
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert pictures.load_cutout(tmp_path / "c.png") is None


def test_recordings(tmp_path: Path) -> None:
    time = np.arange(2 * RATE) / RATE
    padded = np.concatenate([np.zeros(RATE), 0.3 * np.sin(2 * np.pi * 440 * time), np.zeros(RATE)])
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((padded * 32767).astype("<i2").tobytes())
    cleaned = sounds.clean(sounds.decode(tmp_path / "a.wav"))
    assert cleaned is not None and abs(cleaned.size / RATE - 2.0) < 0.05
    assert abs(float(np.sqrt((cleaned**2).mean())) - sounds.LEVEL) < 0.01
    assert sounds.clean(np.zeros(RATE, np.float32)) is None
    assert sounds.clean(np.full(int(0.1 * RATE), 0.5, np.float32)) is None
    (tmp_path / "b.wav").write_bytes(b"no sound")
    assert sounds.decode(tmp_path / "b.wav").size == 0
    filled = sounds.fill(cleaned[:4000], 3 * RATE, np.random.default_rng(0))
    silent = np.abs(filled.reshape(-1, 160)).max(axis=1) < 1e-3
    assert filled.size == 3 * RATE and "1" * 45 not in "".join("01"[int(s)] for s in silent)


def soundfont(path: Path) -> None:
    """One preset, one instrument, one looped sine of 440 Hz that is key 69."""
    time = np.arange(8000) / RATE
    smpl = (np.sin(2 * np.pi * 440 * time) * 20000).astype("<i2").tobytes() + bytes(92)

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data

    def listed(kind: bytes, *chunks: bytes) -> bytes:
        return chunk(b"LIST", kind + b"".join(chunks))

    presets = [
        struct.pack("<20sHHHIII", b"p", 0, 0, 0, 0, 0, 0),
        struct.pack("<20sHHHIII", b"", 0, 0, 1, 0, 0, 0),
    ]
    bags = [struct.pack("<HH", 0, 0), struct.pack("<HH", 1, 0)]
    shdr = struct.pack("<20sIIIIIBbHH", b"s", 0, 8000, 800, 4800, RATE, 69, 0, 0, 1)
    igen = struct.pack("<Hh", 54, 1) + struct.pack("<Hh", 53, 0)
    body = (
        b"sfbk"
        + listed(b"sdta", chunk(b"smpl", smpl))
        + listed(
            b"pdta",
            chunk(b"phdr", b"".join(presets)),
            chunk(b"pbag", b"".join(bags)),
            chunk(b"pmod", bytes(10)),
            chunk(b"pgen", struct.pack("<Hh", 41, 0) + bytes(4)),
            chunk(b"inst", struct.pack("<20sH", b"i", 0) + struct.pack("<20sH", b"", 1)),
            chunk(b"ibag", struct.pack("<HH", 0, 0) + struct.pack("<HH", 2, 0)),
            chunk(b"imod", bytes(10)),
            chunk(b"igen", igen + bytes(4)),
            chunk(b"shdr", shdr + bytes(46)),
        )
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize(("key", "hertz"), [(69, 440.0), (81, 880.0), (57, 220.0)])
def test_soundfont_pitch_and_length(tmp_path: Path, key: int, hertz: float) -> None:
    soundfont(tmp_path / "a.sf2")
    note = SoundFont(tmp_path / "a.sf2").note(0, key, 127, 2.0, RATE)
    assert abs(note.size / RATE - 2.0) < 0.05
    spectrum = np.abs(np.fft.rfft(note[RATE // 2 : RATE // 2 + RATE]))
    assert abs(float(spectrum.argmax()) - hertz) <= 1.5
    with pytest.raises(MediaError, match="program 5"):
        SoundFont(tmp_path / "a.sf2").note(5, key, 127, 1.0, RATE)


def test_not_a_soundfont(tmp_path: Path) -> None:
    (tmp_path / "a.sf2").write_bytes(io.BytesIO(b"RIFFxxxxWAVE").getvalue())
    with pytest.raises(MediaError, match="SoundFont"):
        SoundFont(tmp_path / "a.sf2")


def test_the_real_catalogue() -> None:
    """Only where the packages were fetched already."""
    try:
        catalogue = Catalogue.load()
    except InputError:
        pytest.skip("no scenes catalogue in the user's cache")
    assert len(catalogue.testable("known")) >= 40 and len(catalogue.testable("unseen")) >= 40
    for info in catalogue.classes:
        for kind in ("picture", "sound"):
            train = {a.group for a in info.of(kind, False)}
            held = {a.group for a in info.of(kind, True)}
            assert not train & held
            assert train or not held
    assert all(
        set(row) >= {"file", "package", "version", "author", "licence", "sha256"}
        for row in catalogue.manifest
    )

"""The open packages that scenes are made of: fetched with apt, unpacked, and listed file by file."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from crab_edge.errors import DependencyError, MediaError

PICTURE_SUFFIXES = (".png", ".svg", ".gif", ".webp", ".jpg")
SOUND_SUFFIXES = (".wav", ".mp3", ".ogg", ".flac")


@dataclass(frozen=True)
class Package:
    """A Debian package, the folder in it that counts, and what its files may be used for."""

    name: str
    source: str
    root: str
    licence: str
    skip: tuple[str, ...] = ()


PACKAGES = (
    Package("tuxpaint-stamps-default", "t", "usr/share/tuxpaint/stamps", "GPL-2+", ("symbols/",)),
    Package(
        "gcompris-qt-data",
        "g",
        "rcc/gcompris/src/activities",
        "GPL-3+ (sounds), CC-BY-SA/CC-BY/PD/GPL (pictures)",
    ),
    Package("scratch", "s", "usr/share/scratch/Media", "CC-BY-SA-3.0"),
    Package(
        "openclipart-svg",
        "o",
        "usr/share/openclipart/svg",
        "public domain",
        (
            "shapes/",
            "special/",
            "logos/",
            "buttons/",
            "transportation/aiga",
            "transportation/roadsigns",
            "signs_and_symbols/flags",
            "computer/icons/",
            "people/smilies",
            "unsorted/duplicates",
        ),
    ),
    Package("openttd-opensfx", "x", "opensfx", "CC-BY-SA-3.0 (items CC0 or CC-BY-3.0)"),
    Package("sonic-pi-samples", "p", "usr/share/sonic-pi/samples", "CC0-1.0"),
    Package("sound-icons", "i", "usr/share/sounds/sound-icons", "GPL-2+"),
    Package("fonts-noto-color-emoji", "n", "usr/share/fonts/truetype/noto", "OFL-1.1"),
    Package("ruby-gemojione", "m", "usr/share/rubygems-integration/all/gems", "CC-BY-SA-4.0"),
    Package("fluid-soundfont-gm", "f", "usr/share/sounds/sf2", "MIT"),
)
# What only the second pack needs (`extra_pack.py`).
EXTRA_PACKAGES = (
    Package("hedgewars-data", "h", "usr/share/games/hedgewars/Data/Sounds", "GFDL-1.3", ("Droplet",)),
)
# The resource bundles of gcompris that hold pictures or sounds of single things.
RCC_BUNDLES = (
    "instruments",
    "explore_farm_animals",
    "explore_world_animals",
    "memory-sound",
    "memory",
    "lang",
)


@dataclass
class Source:
    """One unpacked package: `files` are paths relative to `root`, sorted."""

    package: Package
    version: str
    root: Path
    files: list[str]
    credits: dict[str, str] = field(default_factory=dict)

    def match(self, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
        """Files whose path without suffix ends in the pattern (fnmatch, whole path components)."""
        found = []
        for name in self.files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in suffixes:
                continue
            if fnmatch.fnmatchcase("/" + stem, "*/" + pattern):
                found.append(name)
        return found


def fetch_packages(cache_dir: Path, packages: tuple[Package, ...] = PACKAGES) -> dict[str, Source]:
    """Downloads what is missing, unpacks what is not unpacked, returns the sources by letter.

    Raises DependencyError when apt-get or dpkg-deb is missing or a download fails.
    """
    debs, unpacked = cache_dir / "debs", cache_dir / "unpacked"
    debs.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(parents=True, exist_ok=True)
    missing = [p.name for p in packages if _deb_of(debs, p) is None]
    if missing:
        _download(debs, missing)
    sources = {}
    for package in packages:
        deb = _deb_of(debs, package)
        if deb is None:
            raise DependencyError(
                f"{package.name}: apt-get left no .deb in {debs}; run `apt-get update` first"
            )
        sources[package.source] = _open_source(package, deb, unpacked)
    return sources


def _deb_of(debs: Path, package: Package) -> Path | None:
    found = sorted(debs.glob(f"{package.name}_*.deb"))
    return found[-1] if found else None


def _download(debs: Path, names: list[str]) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DependencyError(
            "scenes need the Debian packages "
            + ", ".join(names)
            + f"; apt-get is not here: put their .deb files into {debs} or run on Debian or Ubuntu"
        )
    done = subprocess.run(["apt-get", "download", *names], cwd=debs, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise DependencyError(f"apt-get download failed ({reason}); run `apt-get update` and try again")


def _open_source(package: Package, deb: Path, unpacked: Path) -> Source:
    version = deb.name.removesuffix(".deb").split("_")[1].replace("%3a", ":")
    home = unpacked / package.name
    done = unpacked / f"{package.name}.done"
    if not (done.is_file() and done.read_text().strip() == deb.name):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        if shutil.which("dpkg-deb") is None:
            raise DependencyError(f"dpkg-deb is needed to unpack {deb.name}; install dpkg")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(home)], check=True)
        if package.source == "g":
            for bundle in RCC_BUNDLES:
                unpack_rcc(home / f"usr/share/gcompris-qt/rcc/{bundle}.rcc", home / "rcc")
        elif package.source == "x":
            unpack_opensfx(home / "usr/share/games/openttd/baseset/opensfx/opensfx.cat", home / "opensfx")
        done.write_text(deb.name)
    root = home / package.root
    files = []
    for folder, _, names in os.walk(root):
        relative = os.path.relpath(folder, root)
        for name in names:
            path = name if relative == "." else f"{relative}/{name}"
            if not any(path.startswith(s) for s in package.skip):
                files.append(path)
    return Source(package, version, root, sorted(files), _credits(package.source, root, files))


def _credits(source: str, root: Path, files: list[str]) -> dict[str, str]:
    """File -> who made it, where a package lists that apart from the files."""
    if source == "x":
        table = (root / "credits.tsv").read_text()
        return dict(line.split("\t", 1) for line in table.splitlines() if "\t" in line)
    if source == "p":
        listed = re.findall(
            r"`:(\w+)`\s*- https?://(?:www\.)?(freesound\.org/people/([^/\s]+)/sounds/\d+)",
            (root / "README.md").read_text(),
        )
        # The list says perc_bell_2 where the file is perc_bell2.
        makers = {name.replace("_", ""): f"{maker} ({page})" for name, page, maker in listed}
        stems = {file: Path(file).stem.replace("_", "") for file in files}
        return {file: makers[stem] for file, stem in stems.items() if stem in makers}
    if source == "h":
        return {file: "Hedgewars project (Andrey Korotaev)" for file in files}
    return {}


def unpack_opensfx(path: Path, out: Path) -> int:
    """Writes the clips of an OpenTTD sound set as 00.wav, 01.wav ... and credits.tsv; returns their number.

    A set starts with (offset, size) pairs, little-endian; each clip is a length-prefixed title, then a WAV.
    """
    data = path.read_bytes()
    count = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    out.mkdir(parents=True, exist_ok=True)
    credit = []
    for index in range(count):
        offset, size = struct.unpack_from("<II", data, 8 * index)
        offset &= 0x7FFFFFFF
        length = data[offset]
        title = data[offset + 1 : offset + 1 + length].rstrip(b"\0").decode("latin-1")
        start = offset + 1 + length
        (out / f"{index:02d}.wav").write_bytes(data[start : start + size])
        credit.append(f"{index:02d}.wav\t{title}")
    (out / "credits.tsv").write_text("\n".join(credit) + "\n")
    return count


def unpack_rcc(path: Path, out: Path) -> int:
    """Unpacks a Qt resource bundle (header, tree, names, data; big-endian); returns the number of files."""
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise MediaError(f"{path}: not a Qt resource bundle (starts with {data[:4]!r}, expected b'qres')")
    version, tree, payload, names = struct.unpack_from(">4I", data, 4)
    node = 14 if version == 1 else 22
    count = 0

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        return data[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, folder: Path) -> Iterator[tuple[Path, bytes]]:
        at = tree + index * node
        name_offset, flags = struct.unpack_from(">IH", data, at)
        here = folder / name_at(name_offset) if index else folder
        if flags & 2:
            children, first = struct.unpack_from(">II", data, at + 6)
            for child in range(first, first + children):
                yield from walk(child, here)
            return
        (offset,) = struct.unpack_from(">I", data, at + 10)
        (length,) = struct.unpack_from(">I", data, payload + offset)
        blob = data[payload + offset + 4 : payload + offset + 4 + length]
        if flags & 1:
            blob = zlib.decompress(blob[4:])
        elif flags & 4:
            blob = _zstd(blob)
        yield here, blob

    root = out.resolve()
    for target, blob in walk(0, root):
        if not target.resolve().is_relative_to(root):
            raise MediaError(f"{path}: holds a path outside its folder ({target}); the file is not usable")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(blob)
        count += 1
    return count


def _zstd(blob: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise DependencyError(
            "zstandard is needed for gcompris data; pip install 'crab-edge[train]'"
        ) from error
    return zstandard.ZstdDecompressor().decompress(blob, max_output_size=1 << 28)


@lru_cache(maxsize=1)
def _author_pattern() -> re.Pattern[str]:
    return re.compile(r"<dc:(?:creator|rights)>.*?<dc:title[^>]*>([^<]{2,80})</dc:title>", re.S)


def author_of(source: Source, name: str) -> str | None:
    """The author that the package itself states for a file: SVG metadata or the sound set's credits."""
    if name in source.credits:
        return source.credits[name]
    if name.endswith(".svg"):
        head = (source.root / name).read_text(encoding="utf-8", errors="replace")[:6000]
        found = _author_pattern().search(head)
        if found:
            return " ".join(found.group(1).split())
    return None

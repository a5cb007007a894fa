"""Packages of the npm registry that carry drawings: fetched with `npm pack`, checked, unpacked."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from crab_edge.errors import DependencyError
from crab_edge.training.scenes.packages import Package, Source


@dataclass(frozen=True)
class NpmPackage:
    """A package at one version, known by the hash of its archive; `root` is the folder in it that counts."""

    name: str
    version: str
    source: str
    root: str
    licence: str
    author: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NPM_PACKAGES = (
    NpmPackage(
        "@dicebear/open-peeps",
        "9.4.3",
        "d",
        "lib",
        "CC0-1.0 (drawings)",
        "Pablo Stanley",
        "65b664ec00dc69c068051461f2b5bd97c8335af676e36c284e906a3017c23d4f",
    ),
    NpmPackage(
        "@iconify-json/noto",
        "1.2.9",
        "j",
        ".",
        "Apache-2.0",
        "Google Inc.",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
)


def fetch_npm(cache_dir: Path) -> dict[str, Source]:
    """Downloads and unpacks what is missing; sources by letter.

    DependencyError without npm, without the registry, or when an archive isn't the one that is known.
    """
    archives, unpacked = cache_dir / "npm", cache_dir / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(parents=True, exist_ok=True)
    return {package.source: _open(package, archives, unpacked) for package in NPM_PACKAGES}


def _open(package: NpmPackage, archives: Path, unpacked: Path) -> Source:
    archive = archives / package.archive
    if not archive.is_file():
        _download(package, archives)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DependencyError(
            f"{archive}: sha256 {digest[:12]}..., expected {package.sha256[:12]}...; delete it, fetch again"
        )
    home, done = unpacked / archive.stem, unpacked / f"{archive.stem}.done"
    if not (done.is_file() and done.read_text().strip() == digest):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        with tarfile.open(archive) as file:
            file.extractall(home, filter="data")
        done.write_text(digest)
    root = home / "package" / package.root
    files = sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
    )
    described = Package(package.name, package.source, package.root, package.licence)
    return Source(described, package.version, root, files, {name: package.author for name in files})


def _download(package: NpmPackage, archives: Path) -> None:
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise DependencyError(
            f"faces and figures need the npm package {wanted}; npm is not here: install it, "
            f"or put {package.archive} into {archives}"
        )
    done = subprocess.run([npm, "pack", wanted, "--silent"], cwd=archives, capture_output=True, text=True)
    if done.returncode != 0 or not (archives / package.archive).is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DependencyError(f"npm pack {wanted} failed ({reason}); check the connection and try again")

"""The second pack: fetching, drawing faces, its index, and what it must hold when it is there."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import tomllib
from PIL import Image

from crab_edge.errors import DependencyError, InputError, MediaError
from crab_edge.training.scenes import Catalogue, Extras, SceneSource, TaskScenes, npm
from crab_edge.training.scenes.actors import MOTIONS
from crab_edge.training.scenes.faces import Peeps, Person
from crab_edge.training.scenes.families.action import doings
from crab_edge.training.scenes.pictures import load_poses

PARTS = {
    "head": '<path d="M0 0H300V400H0Z" fill="${escape.xml(`${colors.skin}`)}"/>',
    "face": '<path d="M40 40H80V80H40Z" fill="#000"/>',
    "facialHair": '<path d="M0 0H90V40H0Z" fill="${escape.xml(`${colors.headContrast}`)}"/>',
    "accessories": '<path d="M0 0H90V20H0Z" fill="#00f"/>',
}


def table(name: str) -> dict:
    return tomllib.loads(
        resources.files("crab_edge.training.scenes").joinpath(f"{name}.toml").read_text("utf-8")
    )


def archive(path: Path, name: str) -> str:
    """A package in npm's form; returns its hash."""
    with tarfile.open(path, "w:gz") as file:
        data = b"drawing"
        entry = tarfile.TarInfo(f"package/lib/{name}")
        entry.size = len(data)
        file.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_npm_packages_are_checked_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").mkdir()
    package = npm.NpmPackage("@a/b", "1.0.0", "d", "lib", "CC0", "somebody", "")
    digest = archive(tmp_path / "npm" / "a-b-1.0.0.tgz", "face.js")
    monkeypatch.setattr(npm, "NPM_PACKAGES", (package,))
    with pytest.raises(DependencyError, match="sha256"):
        npm.fetch_npm(tmp_path)
    monkeypatch.setattr(npm, "NPM_PACKAGES", (replace(package, sha256=digest),))
    source = npm.fetch_npm(tmp_path)["d"]
    assert source.files == ["face.js"] and (source.root / "face.js").read_bytes() == b"drawing"
    assert source.credits == {"face.js": "somebody"} and source.version == "1.0.0"
    (tmp_path / "npm" / "a-b-1.0.0.tgz").unlink()
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(DependencyError, match="npm is not here"):
        npm.fetch_npm(tmp_path)


def test_a_person_is_drawn_in_layers(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "components").mkdir()
    for kind, svg in PARTS.items():
        text = f"export const {kind} = {{\n    one: (components, colors) => `{svg}`,\n}};\n"
        (tmp_path / "components" / f"{kind}.js").write_text(text)
    body = (
        '<g fill-rule="evenodd"><path d="M0 600H704V704H0Z" fill="${escape.xml(`${colors.clothing}`)}"/></g>'
    )
    (tmp_path / "index.js").write_text(f'body: `{body}<g transform="x">${{head}}</g>`')
    peeps = Peeps(tmp_path)
    person = Person("one", "ff0000", "00ff00", "0000ff")
    under = peeps.under(person)
    assert under.shape == (224, 224, 4)
    assert tuple(under[100, 90]) == (255, 0, 0, 255) and tuple(under[215, 20]) == (0, 255, 0, 255)
    assert under[5, 5, 3] == 0 and peeps.over(person) is None
    over = peeps.over(replace(person, beard="one"))
    assert over is not None and tuple(over[132, 100]) == (0, 0, 255, 255)
    face = peeps.expression("one")
    assert face[98, 118, 3] == 255 and face[10, 10, 3] == 0
    (tmp_path / "components" / "head.js").write_text("nothing")
    with pytest.raises(MediaError, match="head"):
        _ = Peeps(tmp_path).parts


def test_poses_keep_one_scale(tmp_path: Path) -> None:
    for name, size in (("a", (100, 400)), ("b", (200, 200))):
        picture = np.zeros((size[1] + 20, size[0] + 20, 4), np.uint8)
        picture[10:-10, 10:-10] = (200, 100, 50, 255)
        # Without a gap it would be a photo with its background.
        picture[60:110, 30:80] = 0
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    tall, wide = load_poses([tmp_path / "a.png", tmp_path / "b.png"])
    assert tall.shape[:2] == (224, 56) and wide.shape[:2] == (112, 112)
    assert load_poses([tmp_path / "a.png", tmp_path / "none.png"]) is None


def test_tables_fit_together() -> None:
    actions, emotions = table("actions"), table("emotions")
    assert all(entry["motion"] in MOTIONS for entry in actions["action"].values())
    assert all(entry.get("ks") or entry.get("ucf") for entry in actions["action"].values())
    for style in ("ks", "ucf"):
        entries = [*actions["action"].values(), *actions["played"].values()]
        labels = [entry[style] for entry in entries if style in entry]
        assert len(labels) == len(set(labels)) >= 20
    names = set(emotions["emotion"])
    for task, count in (("meld", 7), ("mer24", 6), ("cremad", 6), ("mafw", 11), ("dfew", 7)):
        assert set(emotions["labels"][task]) <= names
        assert len(set(emotions["labels"][task].values())) == count
    classes = {label for group in table("classes").values() for label in group}
    assert set(actions["played"]) <= classes


def test_no_pack_or_an_old_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scenes fetch"):
        Extras.load(tmp_path)
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "index.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(InputError, match="format 0"):
        Extras.load(tmp_path)


def test_the_real_pack() -> None:
    """Only where the packages were fetched already."""
    try:
        catalogue, extras = Catalogue.load(), Extras.load()
    except InputError:
        pytest.skip("no scenes packs in the user's cache")
    needed = {"file", "package", "version", "author", "licence", "sha256"}
    assert all(set(row) >= needed for row in extras.manifest)
    assert {row["package"] for row in extras.manifest} >= {
        "hedgewars-data",
        "@dicebear/open-peeps",
        "scratch",
    }
    for test in (False, True):
        voices = [v for v in extras.voices if v.test == test]
        for words in extras.labels.values():
            for name in words:
                emotion = extras.emotion(name)
                assert any(line in v.lines for v in voices for line in emotion.lines), (name, test)
                assert set(emotion.faces) <= set(extras.expressions)
        assert sum(face.test == test for face in extras.faces) >= 15
    heads = {test: {f.under.group for f in extras.faces if f.test == test} for test in (False, True)}
    assert not heads[False] & heads[True]
    for action in extras.actions:
        for assets in (action.figures, action.sounds):
            assert not {a.group for a in assets if a.test} & {a.group for a in assets if not a.test}
    for split, sounds, least in (("train", "known", 20), ("test", "known", 20), ("test", "unseen", 15)):
        scenes = TaskScenes(SceneSource(catalogue, split, sounds), extras)
        assert min(len(doings(scenes.kit, style)) for style in ("ks", "ucf")) >= least

"""What a manifest says of engines, and what it is refused for."""

import pytest
from pydantic import ValidationError

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import BundleError
from crab_edge.manifest import EngineGraph, EngineInfo, EngineProfile, TensorInfo
from tests.fake_bundle import write_fake_bundle


def engine(file="engines/rtx/decoder.engine", **changes):
    tensor = TensorInfo(name="x", dtype="float16", shape=[1, "S"])
    graph = EngineGraph(
        file=file,
        inputs=[tensor],
        outputs=[tensor],
        aliases={"present.0.key": "past.0.key"},
        profiles=[EngineProfile(name="decode", axes={"S": (1, 1, 8)})],
    )
    given = {
        "kind": "rtx",
        "library": "tensorrt_rtx",
        "version": "1.7.1.116",
        "sm": [86, 89, 120],
        "capacity": 2048,
        "plugins": {"route": "0" * 64},
        "graphs": {"decoder": graph},
        "built": True,
        "build_command": "crab-edge export --target rtx",
    }
    return EngineInfo(**given | changes)


def published(folder, engines, files):
    """The fake bundle with these engines and files."""
    plain = Bundle.open(write_fake_bundle(folder / "plain"))
    with BundleWriter(folder / "out") as writer:
        for name in plain.manifest.files:
            writer.path(name).write_bytes((plain.path / name).read_bytes())
        for name in files:
            writer.path(name).write_bytes(b"engine")
        content = plain.manifest.model_dump() | {"engines": engines}
        return writer.commit(type(plain.manifest).model_validate(content))


def test_engines_survive_the_way_to_the_disk_and_back(tmp_path):
    wanted = engine()
    path = published(tmp_path, {"rtx": wanted.model_dump()}, ["engines/rtx/decoder.engine"])
    assert Bundle.open(path, full=True).manifest.engines == {"rtx": wanted}


def test_a_bundle_whose_engine_is_missing_is_not_published(tmp_path):
    with pytest.raises(BundleError, match=r"lists no engines/rtx/decoder\.engine"):
        published(tmp_path, {"rtx": engine().model_dump()}, [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["decoder.engine", "engines/other/decoder.engine", "engines/rtx/../decoder"])
def test_an_engine_lies_in_its_targets_folder(tmp_path, file):
    with pytest.raises(ValidationError):
        published(tmp_path, {"rtx": engine(file).model_dump()}, [])


@pytest.mark.parametrize(
    "changes",
    [{"version": "newest"}, {"sm": []}, {"capacity": 0}, {"plugins": {"route": "abc"}}, {"surprise": 1}],
)
def test_fields_are_checked(changes):
    with pytest.raises(ValidationError):
        engine(**changes)


@pytest.mark.parametrize("bounds", [(0, 1, 2), (1, 5, 4), (3, 2, 4)])
def test_profiles_are_in_order(bounds):
    with pytest.raises(ValidationError):
        EngineProfile(name="decode", axes={"S": bounds})

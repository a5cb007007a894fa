"""Records and media in AV-UIE v2's layout, read back by the runtime's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from crab_edge import avuie as reader
from crab_edge import tasks
from crab_edge.clip import Clip
from crab_edge.errors import InputError, TaskError
from crab_edge.training.scenes import Catalogue, SceneSource
from crab_edge.training.scenes.avuie import TASKS, write_avuie
from crab_edge.training.scenes.describe import describe_mix

OFFICIAL = {
    "ave": {"event", "vid", "start_time", "end_time", "label_content"},
    "avvp": {"filename", "vid", "event", "label_content"},
    "arig": {"visual_path", "audio_path", "top_left", "bottom_right", "frame_idx", "a_obj"},
    "avqa": {"video_id", "question_id", "type", "question", "answer", "video_path", "audio_path", "label"},
    "avcap": {"video_id", "label_content"},
}


@pytest.fixture(scope="module")
def folder(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("AVUIE_2")
    for task in TASKS:
        write_avuie(SceneSource(catalogue, "test"), out, task, "test", 2)
    write_avuie(SceneSource(catalogue, "test", "unseen"), out, "arig", "test", 2)
    write_avuie(SceneSource(catalogue, "train"), out, "arig", "train", 2)
    return out


@pytest.mark.parametrize("task", TASKS)
def test_the_reader_takes_every_record(folder: Path, task: str) -> None:
    (path, *_) = reader.splits(folder, tasks.get(task))
    split = reader.read_split(path, tasks.get(task))
    reader.check_media([split])
    assert len(split.records) >= 2
    for record in split.records:
        assert OFFICIAL[task] <= set(record.fields)
        assert record.truth is not None
        kinds = [kind for _, kind in record.media]
        assert kinds == (["image", "audio"] if task == "arig" else ["video", "audio"])


def test_lists_of_the_other_splits(folder: Path) -> None:
    names = {path.name for path in (folder / "arig").glob("*.json")}
    assert names == {"test.json", "test_unseen.json", "train.json"}
    for record in json.loads((folder / "arig/train.json").read_text()):
        assert (folder / "arig" / record["image_path"]).is_file()
        assert reader.target(record, tasks.get("arig")).startswith("The sounding object is ")


def test_media_hold_the_rendered_scene(catalogue: Catalogue, folder: Path) -> None:
    scene = SceneSource(catalogue, "test").clip(0)
    record = json.loads((folder / "avqa/test.json").read_text())[0]
    clip = Clip.open([folder / "avqa" / record["video_path"]])
    frames = clip.videos[0].frames(10)
    assert frames.shape == scene.frames.shape
    assert np.abs(frames.astype(int) - scene.frames).mean() < 12
    assert abs(clip.duration_s - scene.duration_s) < 0.1
    own = Clip.open([folder / "avqa" / record["audio_path"]]).audios[0].waveform()
    inside = clip.audios[0].waveform()[: own.size]
    assert np.corrcoef(own[: inside.size], inside)[0, 1] > 0.9
    assert np.abs(own - scene.wave[: own.size]).max() < 1e-3


def test_one_scene_is_stored_once(folder: Path) -> None:
    first = json.loads((folder / "avqa/test.json").read_text())[0]["video_path"]
    assert (folder / "avqa" / first).stat().st_ino == (folder / "avcap" / first).stat().st_ino


def test_the_mix(folder: Path) -> None:
    text = "\n".join(describe_mix(folder))
    assert "arig/test: 2 records" in text and "sounds 1: 100 %" in text and "silent object in view" in text
    assert describe_mix(folder / "ave/test.json")[0] == "ave/test: 2 records"


def test_refusals(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nonesuch"):
        write_avuie(SceneSource(catalogue, "test"), tmp_path, "nonesuch", "test", 1)
    with pytest.raises(TaskError, match="train"):
        write_avuie(SceneSource(catalogue, "train"), tmp_path, "ave", "test", 1)
    with pytest.raises(InputError, match="scenes render"):
        describe_mix(tmp_path)
    (tmp_path / "test.json").write_text('[{"event": "dog"}]')
    with pytest.raises(InputError, match="scene"):
        describe_mix(tmp_path / "test.json")

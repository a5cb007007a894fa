"""Records and media in AV-UIE v2's layout, read back by the runtime's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crab_edge import avuie as reader
from crab_edge import tasks
from crab_edge.clip import Clip
from crab_edge.errors import InputError, TaskError
from crab_edge.training.scenes import Catalogue, Extras, SceneSource
from crab_edge.training.scenes.avuie import TASKS, task_names, write_avuie
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


EMOTION = {"video_path", "audio_path", "label"}
MATCHED = {"audio_path", "video1_path", "video2_path", "correct_video", "audio_event", "label"}
#: What the official test lists hold, and where the answer's text is.
OTHERS = {
    "a2v": (MATCHED | {"video1_event", "video2_event"}, "label"),
    "v2a": ({"video_path", "audio1_path", "audio2_path", "correct_audio", "video_event"}, "label"),
    "ks": ({"video_path", "audio_path", "action"}, "label"),
    "ucf": ({"video_path", "audio_path", "label"}, "new_label"),
    "meld": (EMOTION | {"Emotion"}, "label"),
    "mer24": (EMOTION | {"discrete"}, "label"),
    "cremad": (EMOTION | {"emotion"}, "label"),
    "mafw": (EMOTION | {"emotion"}, "label"),
    "dfew": (EMOTION | {"emotion"}, "label"),
    "avqa-music": (OFFICIAL["avqa"], "label"),
    "avqa_thu": (
        {"id", "video_name", "video_id", "question_relation", "question_type", "multi_choice"}
        | {"question_text", "answer"},
        "label",
    ),
    "unav": ({"vid", "original_label"}, "label_content"),
    "s4": ({"visual_path", "audio_path", "vid", "uid", "a_obj", "frame_idx"}, "label_content"),
    "ms3": ({"visual_path", "audio_path", "vid", "uid", "a_obj", "frame_idx"}, "label_content"),
    "ref_avs": ({"visual_path", "object", "frame_idx", "split", "vid", "fid", "uid"}, "output"),
}


@pytest.fixture(scope="module")
def others(catalogue: Catalogue, extras: Extras, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("AVUIE_2")
    for task in OTHERS:
        write_avuie(SceneSource(catalogue, "test"), out, task, "test", 2, extras=extras)
    for task in ("ref_avs", "s4"):
        write_avuie(SceneSource(catalogue, "train"), out, task, "train", 1)
    write_avuie(SceneSource(catalogue, "test", "unseen"), out, "meld", "test", 1, extras=extras)
    return out


def test_all_tasks_are_covered() -> None:
    assert set(task_names()) == set(OTHERS) | set(TASKS)


@pytest.mark.parametrize("task", OTHERS)
def test_records_of_the_other_tasks(others: Path, task: str) -> None:
    folder, stem = ("avqa", "test_music") if task == "avqa-music" else (task, "test")
    records = json.loads((others / folder / f"{stem}.json").read_text())
    assert len(records) >= 2
    fields, target = OTHERS[task]
    for record in records:
        assert fields <= set(record) and record[target]
        for name in record:
            if name.endswith("_path"):
                assert (others / folder / record[name]).is_file()
        assert {"seconds", "sounds", "classes heard"} <= set(record["scene"])


@pytest.mark.parametrize("task", OTHERS)
def test_the_reader_takes_what_is_declared(others: Path, task: str) -> None:
    name = task.removesuffix("-music")
    path = others / name / ("test_music.json" if task == "avqa-music" else "test.json")
    split = reader.read_split(path, tasks.get(name))
    reader.check_media([split])
    for record in split.records:
        assert record.truth
        said = tasks.get(name).parse(reader.target(record.fields, tasks.get(name)))
        assert "Unparsed" not in {type(result).__name__ for result in said}


def test_names_of_lists(others: Path) -> None:
    assert {p.name for p in (others / "meld").glob("*.json")} == {"test.json", "test_unseen.json"}
    assert {p.name for p in (others / "avqa").glob("*.json")} == {"test_music.json"}


def test_matching_clips_are_silent(others: Path) -> None:
    record = json.loads((others / "a2v/test.json").read_text())[0]
    with av.open(str(others / "a2v" / record["video1_path"])) as container:
        assert container.streams.video and not container.streams.audio
    record = json.loads((others / "ks/test.json").read_text())[0]
    with av.open(str(others / "ks" / record["video_path"])) as container:
        assert container.streams.video and container.streams.audio


def test_masks_lie_where_the_official_evaluation_looks(others: Path) -> None:
    for task in ("s4", "ms3", "ref_avs"):
        for record in json.loads((others / task / "test.json").read_text()):
            image, mask = Path(record["visual_path"]), Path(record["mask_path"])
            if task == "ref_avs":
                clip = str(image.parent.parent).replace("media", "gt_mask")
                assert mask == Path(clip, f"fid_{record['fid']}", f"0000{image.stem}.png")
            else:
                assert mask == image.parent.parent / "labels_rgb" / f"{image.stem}.png"
            shown = Image.open(others / task / mask)
            assert shown.size == Image.open(others / task / image).size
            assert set(np.unique(np.asarray(shown))) <= {0, 255}
    train = json.loads((others / "ref_avs/train.json").read_text())[0]
    assert {"image_path", "description", "idx", "output"} <= set(train)
    assert json.loads((others / "s4/train.json").read_text())[0]["frame_idx"] == 0


def test_notes_say_what_is_staged(others: Path) -> None:
    assert any("staged" in line for line in describe_mix(others / "meld/test.json"))
    assert not any("staged" in line for line in describe_mix(others / "s4/test.json"))

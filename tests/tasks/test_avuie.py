"""Reading AV-UIE v2's lists: names that differ, media that are missing, records that are broken."""

import json

import pytest

from crab_edge import avuie, tasks
from crab_edge.errors import InputError
from crab_edge.results import Box, Choice, Event


def write(folder, name, records, files=()):
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


def test_ave_names_its_clip(tmp_path):
    record = {"event": "Male speech, man speaking", "vid": "-67U", "start_time": "2", "end_time": 7}
    path = write(tmp_path / "ave", "test", [record], ["video/-67U.mp4", "audio/-67U.mp3"])
    split = avuie.read_split(path, tasks.get("ave"))
    [found] = split.records
    assert found.media == (
        (tmp_path / "ave/video/-67U.mp4", "video"),
        (tmp_path / "ave/audio/-67U.mp3", "audio"),
    )
    assert found.truth == (Event("Male speech, man speaking", 2, 7, "audio-visual"),)
    assert found.question is None and not found.missing and found.key.startswith("0-")
    avuie.check_media([split])


@pytest.mark.parametrize("given", ["a.mp4", "video/a.mp4", "/home/author/AVUIE_2/ave/video/a.mp4"])
def test_video_paths_in_several_forms(tmp_path, given):
    record = {"event": "dog", "video_path": given, "audio_path": "a.wav", "start_time": 0, "end_time": 1}
    path = write(tmp_path / "ave", "test", [record], ["video/a.mp4", "audio/a.wav"])
    [found] = avuie.read_split(path, tasks.get("ave")).records
    assert [media.name for media, _ in found.media] == ["a.mp4", "a.wav"] and not found.missing


def test_filename_with_a_suffix(tmp_path):
    text = "<visual_event>Dog,(0 5)</visual_event>"
    path = write(
        tmp_path / "avvp", "test", [{"filename": "x.mp4", "event": text}], ["video/x.mp4", "audio/x.mp3"]
    )
    [found] = avuie.read_split(path, tasks.get("avvp")).records
    assert [media.name for media, _ in found.media] == ["x.mp4", "x.mp3"]
    assert found.truth == (Event("Dog", 0, 5, "visual"),)


def test_arig_in_its_test_form(tmp_path):
    record = {"visual_path": "img/1.jpg", "audio_path": "wav/1.wav", "a_obj": "bus", "frame_idx": 0}
    records = [
        {**record, "top_left": [1, 2], "bottom_right": [30, 40]},
        {**record, "top_left": "(1, 2)", "bottom_right": "(30, 40)"},
        {**record, "top_left": [1000, 1000], "bottom_right": [1000, 1000]},
    ]
    path = write(tmp_path / "arig", "test_unseen", records, ["img/1.jpg", "wav/1.wav"])
    split = avuie.read_split(path, tasks.get("arig"))
    assert [found.truth for found in split.records] == [(Box("bus", 1, 2, 30, 40),)] * 2 + [None]
    assert split.records[0].media[0] == (tmp_path / "arig/img/1.jpg", "image")
    assert split.variant == "unseen"


def test_avqa_question_and_answer(tmp_path):
    record = {
        "video_path": "a.mp4",
        "audio_path": "a.wav",
        "question": "Is it?",
        "answer": "Yes",
        "label": "prose",
    }
    path = write(tmp_path / "avqa", "test", [record], ["video/a.mp4", "audio/a.wav"])
    [found] = avuie.read_split(path, tasks.get("avqa")).records
    assert found.question == "Is it?" and found.truth == (Choice("yes"),)
    assert avuie.target(record, tasks.get("avqa")) == "prose"


def test_two_videos_and_two_audios(tmp_path):
    recipe = tasks.MediaRecipe("a2v", videos=2, audios=1)
    record = {"video1_path": "1.mp4", "video2_path": "2.mp4", "audio_path": "a.wav"}
    found = list(avuie.media_paths(record, recipe, tmp_path))
    assert [(path.name, kind) for path, kind in found] == [
        ("1.mp4", "video"),
        ("2.mp4", "video"),
        ("a.wav", "audio"),
    ]
    with pytest.raises(InputError, match="lacks the field video1_path"):
        list(avuie.media_paths({"audio_path": "a.wav"}, recipe, tmp_path))


def test_lists_in_order(tmp_path):
    for name in ("test_unseen", "train", "test", "test_b"):
        write(tmp_path / "arig", name, [])
    assert [path.stem for path in avuie.splits(tmp_path, tasks.get("arig"))] == [
        "test",
        "test_b",
        "test_unseen",
    ]
    assert avuie.splits(tmp_path, tasks.get("ave")) == []


def test_missing_media_are_found_before_a_run(tmp_path):
    records = [{"event": "dog", "vid": name, "start_time": 0, "end_time": 1} for name in "ab"]
    path = write(tmp_path / "ave", "test", records, ["video/a.mp4", "audio/a.wav", "audio/b.mp3"])
    split = avuie.read_split(path, tasks.get("ave"))
    with pytest.raises(InputError, match=r"1 of 4 media files are missing, the first is .*video/b\.mp4; "):
        avuie.check_media([split])
    assert avuie.read_split(path, tasks.get("ave"), limit=1).records[0].missing == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"a": 1}', "expected a JSON list of objects"),
        ("[1]", "expected a JSON list of objects"),
        ('[{"event": "dog"}]', r"record 0: a record lacks the field video_path or visual_path or vid"),
        (
            '[{"vid": "a", "event": "dog", "start_time": 0}]',
            "record 0: a record lacks the field end_time; it has",
        ),
        ('[{"vid": "a", "event": "dog", "start_time": "x", "end_time": 1}]', "record 0: could not convert"),
        ('[{"vid": "../a", "event": "dog", "start_time": 0, "end_time": 1}]', "isn't a file name"),
        ('[{"video_path": "../a", "event": "dog", "start_time": 0, "end_time": 1}]', "leaves the folder"),
    ],
)
def test_broken_lists_name_file_and_record(tmp_path, text, message):
    path = tmp_path / "ave" / "test.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        avuie.read_split(path, tasks.get("ave"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_absent_list(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        avuie.read_records(tmp_path / "test.json")

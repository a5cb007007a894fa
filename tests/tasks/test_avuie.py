"""Reading AV-UIE v2's lists: names that differ, media that are missing, records that are broken."""

import json

import pytest

from crab_edge import avuie, tasks
from crab_edge.errors import InputError
from crab_edge.results import Box, Choice, Event, MaskFile


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
    recipe = tasks.get("a2v").media
    record = {"video1_path": "1.mp4", "video2_path": "2.mp4", "audio_path": "a.wav"}
    found = list(avuie.media_paths(record, recipe, tmp_path))
    assert [(path.name, kind) for path, kind in found] == [
        ("1.mp4", "video"),
        ("2.mp4", "video"),
        ("a.wav", "audio"),
    ]
    with pytest.raises(InputError, match="lacks the field video1_path"):
        list(avuie.media_paths({"audio_path": "a.wav"}, recipe, tmp_path))


PAIR = {"audio_event": "dog", "label": "I hear a dog. <answer>two</answer>"}
AV = {"video_path": "c/a.avi", "audio_path": "c/a.wav"}
SEEN = {"audio_path": "media/x/audio.wav", "vid": "x", "uid": "x_0"}


@pytest.mark.parametrize(
    ("name", "record", "truth", "target"),
    [
        (
            "a2v",
            {
                "video1_path": "1.mp4",
                "video2_path": "2.mp4",
                "audio_path": "a.mp3",
                "correct_video": 2,
                **PAIR,
            },
            Choice("2"),
            PAIR["label"],
        ),
        (
            "v2a",
            {
                "video_path": "1.mp4",
                "audio1_path": "1.mp3",
                "audio2_path": "2.mp3",
                "correct_audio": "1",
                **PAIR,
            },
            Choice("1"),
            PAIR["label"],
        ),
        ("ks", {**AV, "action": "Playing drums", "label": "prose"}, Choice("playing drums"), "prose"),
        ("ucf", {**AV, "label": "ApplyEyeMakeup", "new_label": "prose"}, Choice("applyeyemakeup"), "prose"),
        ("meld", {**AV, "Emotion": "joy", "label": "prose"}, Choice("joy"), "prose"),
        ("mer24", {**AV, "discrete": "worried", "label": "prose"}, Choice("worried"), "prose"),
        ("dfew", {**AV, "emotion": "sad", "label": "prose"}, Choice("sad"), "prose"),
        (
            "unav",
            {**AV, "vid": "a", "original_label": [1], "label_content": "<event>dog, (0 3)</event>"},
            Event("dog", 0, 3, "audio-visual"),
            "<event>dog, (0 3)</event>",
        ),
    ],
)
def test_records_of_the_other_tasks(tmp_path, name, record, truth, target):
    task = tasks.get(name)
    files = [f"video/{record[f]}" for f in record if f.startswith("video") and f.endswith("path")]
    files += [f"audio/{record[f]}" for f in record if f.startswith("audio") and f.endswith("path")]
    path = write(tmp_path / name, "test", [record], files)
    [found] = avuie.read_split(path, task).records
    assert found.truth == (truth,) and not found.missing and len(found.media) == len(files)
    assert found.frame is None and avuie.target(record, task) == target


def test_avqa_thu_puts_its_options_into_the_question(tmp_path):
    record = {
        "id": 1,
        "video_name": "-HG3_000030",
        "video_id": 341,
        "question_text": "What is it?",
        "multi_choice": ["Bus", "3 dogs", "0", "Rain."],
        "answer": 3,
    }
    files = ["video/-HG3_000030.mp4", "audio/-HG3_000030.wav"]
    task = tasks.get("avqa_thu")
    for answer, truth in ((3, "rain"), ("1", "3 dogs"), ("0", "0"), ("Bus", "bus")):
        path = write(tmp_path / "avqa_thu", "test", [{**record, "answer": answer}], files)
        [found] = avuie.read_split(path, task).records
        assert found.truth == (Choice(truth),) and not found.missing
    assert task.prompt(found.question) == (
        "Please answer the question based on the options: "
        "What is it?, options:['Bus', '3 dogs', '0', 'Rain.']"
    )
    path = write(tmp_path / "avqa_thu", "test", [{**record, "answer": 4}], files)
    with pytest.raises(InputError, match="the answer 4 isn't one of the 4 options"):
        avuie.read_split(path, task)


def test_masks_lie_where_the_official_evaluation_looks(tmp_path):
    record = {"visual_path": "v1s/x/frames/3.jpg", "audio_path": "v1s/x/audio.wav", "a_obj": "dog"}
    files = ["v1s/x/frames/3.jpg", "v1s/x/audio.wav", "v1s/x/labels_rgb/3.png"]
    path = write(tmp_path / "ms3", "test", [{**record, "frame_idx": 3}], files)
    [found] = avuie.read_split(path, tasks.get("ms3")).records
    assert found.truth == (MaskFile("dog", tmp_path / "ms3/v1s/x/labels_rgb/3.png"),)
    assert found.frame == 3 and not found.missing and len(found.files) == 3
    own = {**record, "visual_path": "a.png", "mask_path": "m/a.png"}
    path = write(tmp_path / "s4", "test", [own], ["a.png", "v1s/x/audio.wav"])
    split = avuie.read_split(path, tasks.get("s4"))
    assert split.records[0].frame == 0 and split.records[0].missing == [tmp_path / "s4/m/a.png"]
    with pytest.raises(InputError, match=r"1 of 3 media files are missing, the first is .*m/a\.png"):
        avuie.check_media([split])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame_idx": 5}, "frame 5 of 5 parts of the sound; expected 0 to 4"),
        ({"visual_path": "a.png"}, "lacks the field mask_path"),
        ({"visual_path": "../frames/a.png"}, "leaves the folder"),
    ],
)
def test_bad_segmentation_records(tmp_path, fields, message):
    record = {"visual_path": "frames/0.jpg", "audio_path": "a.wav", "a_obj": "dog", **fields}
    with pytest.raises(InputError, match=message):
        avuie.read_split(write(tmp_path / "s4", "test", [record]), tasks.get("s4"))


def test_ref_avs_in_its_test_and_train_form(tmp_path):
    test = {**SEEN, "visual_path": "media/x/frames/7.jpg", "object": "The Guitar", "fid": 2, "frame_idx": 7}
    files = ["media/x/frames/7.jpg", "media/x/audio.wav", "gt_mask/x/fid_2/00007.png"]
    records = [{**test, "split": "test_s"}, {**test, "split": "test_n", "fid": 9}]
    task = tasks.get("ref_avs")
    split = avuie.read_split(write(tmp_path / "ref_avs", "test", records, files), task)
    seen, absent = split.records
    mask = MaskFile("The Guitar", tmp_path / "ref_avs/gt_mask/x/fid_2/00007.png")
    assert seen.truth == (Choice("true"), mask) and seen.frame == 7 and not seen.missing
    assert absent.truth == (Choice("false"),) and not absent.missing
    assert "<des>the guitar</des>" in task.prompt(seen.question)
    train = {
        **SEEN,
        "image_path": "media/x/frames/7.jpg",
        "description": "The Guitar",
        "idx": 7,
        "output": "o",
    }
    assert avuie.target(train, task) == "o" and avuie.frame_index(train, task.media) == 7
    assert [kind for _, kind in avuie.media_paths(train, task.media, tmp_path)] == ["image", "audio"]


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

"""Scenes of the other tasks: one number, one scene; answers say the truth; splits stay apart."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.errors import InputError, TaskError
from crab_edge.training.scenes import Catalogue, Extras, SceneSource, TaskScene, TaskScenes
from crab_edge.training.scenes.avuie import task_names
from crab_edge.training.scenes.families import needing_extras
from crab_edge.training.scenes.families.masked import is_unseen
from crab_edge.training.scenes.families.music import Player, question_templates, questions
from crab_edge.training.scenes.silhouettes import box_of, points_of, squared

NAMES = TaskScenes.tasks()


@pytest.fixture(scope="module")
def test_scenes(catalogue: Catalogue, extras: Extras) -> TaskScenes:
    return TaskScenes(SceneSource(catalogue, "test"), extras)


@pytest.fixture(scope="module")
def train_scenes(catalogue: Catalogue, extras: Extras) -> TaskScenes:
    return TaskScenes(SceneSource(catalogue, "train"), extras)


@pytest.fixture(scope="module")
def unseen_scenes(catalogue: Catalogue, extras: Extras) -> TaskScenes:
    return TaskScenes(SceneSource(catalogue, "test", "unseen"), extras)


def arrays(scene: TaskScene) -> list[np.ndarray]:
    still = [a for a in (scene.image, scene.mask) if a is not None]
    return [*(film.frames(3) for film in scene.films), *still, *scene.waves]


def equal(a: TaskScene, b: TaskScene) -> bool:
    same = (a.samples, a.facts, a.used, a.frame) == (b.samples, b.facts, b.used, b.frame)
    return same and all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def test_every_task_has_scenes() -> None:
    assert {task.name for task in tasks.all()} <= set(task_names())
    assert len(set(task_names()) - {"avqa-music"}) == 19


@pytest.mark.parametrize("task", NAMES)
def test_same_number_same_scene(train_scenes: TaskScenes, task: str) -> None:
    first, again = train_scenes.scene(task, 2), pickle.loads(pickle.dumps(train_scenes)).scene(task, 2)
    assert equal(first, again)
    assert not equal(first, train_scenes.scene(task, 3))


@pytest.mark.parametrize("task", NAMES)
def test_media_of_a_task(test_scenes: TaskScenes, task: str) -> None:
    scene = test_scenes.scene(task, 1)
    films, waves = {"a2v": (2, 1), "v2a": (1, 2)}.get(task, (1, 1))
    if task in ("s4", "ms3", "ref_avs"):
        assert not scene.films and scene.picture is not None and scene.mask is not None
        assert scene.mask.shape == (scene.picture.height, scene.picture.width)
        films = 0
    assert (len(scene.films), len(scene.waves)) == (films, waves)
    for wave in scene.waves:
        assert wave.dtype == np.float32 and 0 < np.abs(wave).max() <= 1.0
        assert abs(wave.size / 16000 - scene.duration_s) < 0.01
    for film in scene.films:
        assert film.frames(4).shape == (4, 224, 224, 3)


def test_splits_share_no_picture_recording_or_voice(
    catalogue: Catalogue,
    extras: Extras,
    train_scenes: TaskScenes,
    test_scenes: TaskScenes,
    unseen_scenes: TaskScenes,
) -> None:
    used = {
        name: set().union(*(scenes.scene(task, i).used for task in NAMES for i in range(3)))
        for name, scenes in (("train", train_scenes), ("test", test_scenes), ("unseen", unseen_scenes))
    }
    classes = catalogue.classes + catalogue.silent_pictures
    pictures = {a.key: a.test for c in classes for a in c.pictures}
    pictures |= {a.key: a.test for a in catalogue.backgrounds}
    pictures |= {face.key: face.test for face in extras.faces}
    pictures |= {p.key: p.test for action in extras.actions for f in action.figures for p in f.poses}
    heard = {a.key: a.test for c in classes for a in c.sounds}
    heard |= {line.key: voice.test for voice in extras.voices for line in voice.lines.values()}
    heard |= {s.key: s.test for action in extras.actions for s in action.sounds}
    for split, held_pictures, held_sounds in (
        ("train", False, False),
        ("test", True, False),
        ("unseen", True, True),
    ):
        assert {pictures[k] for k in used[split] if k in pictures} == {held_pictures}
        assert {heard[k] for k in used[split] if k in heard} == {held_sounds}
        assert used[split] <= set(pictures) | set(heard) | {a.key for a in extras.expressions.values()}


@pytest.mark.parametrize("task", ["a2v", "v2a"])
def test_the_right_one_matches(test_scenes: TaskScenes, task: str) -> None:
    answers = set()
    for index in range(12):
        scene = test_scenes.scene(task, index)
        record = scene.samples[0].metadata
        right = record["correct_video" if task == "a2v" else "correct_audio"]
        answers.add(right)
        assert scene.samples[0].answer == f"<answer>{right}</answer>" == record["label"]
        if task == "a2v":
            events = record["video1_event"], record["video2_event"]
            assert [film.stage.things[0].info.label for film in scene.films] == list(events)
            assert events[right - 1] == record["audio_event"] and events[0] != events[1]
        else:
            events = record["audio1_event"], record["audio2_event"]
            assert scene.films[0].stage.things[0].info.label == record["video_event"]
            assert events[right - 1] == record["video_event"] and events[0] != events[1]
        assert all(film.wave is None for film in scene.films)
    assert answers == {1, 2}


def test_actions_are_shown_by_their_figures(test_scenes: TaskScenes, extras: Extras) -> None:
    for index in range(10):
        scene = test_scenes.scene("ks", index)
        action = scene.samples[0].metadata["action"]
        figures = {key.split("-")[0] for key in scene.used if "#" in key}
        if action != "playing violin":
            assert figures == {f"s:{action}"}
            first, last = scene.films[0].frames(10)[[0, 4]]
            assert not np.array_equal(first, last)
        else:
            assert any(key.startswith("o:violin") for key in scene.used)
        record = test_scenes.scene("ucf", index).samples[0].metadata
        assert record["new_label"] == f"<answer>{record['label'].lower()}</answer>"


@pytest.mark.parametrize("task", ["meld", "mer24", "cremad", "mafw", "dfew"])
def test_voice_and_face_show_the_emotion(unseen_scenes: TaskScenes, extras: Extras, task: str) -> None:
    field = {"meld": "Emotion", "mer24": "discrete"}.get(task, "emotion")
    for index in range(4):
        scene = unseen_scenes.scene(task, index)
        word = scene.samples[0].metadata[field]
        emotion = extras.emotion(word.split("-")[1])
        lines = [key for key in scene.used if key.startswith("h:")]
        assert lines == [f"h:Eve/{emotion.lines[0]}"]
        shown = {key.removeprefix("e:") for key in scene.used if key.startswith("e:")}
        assert shown and shown <= set(emotion.faces) | {"serious"}
        assert "staged" in scene.facts["note"] and 2.0 <= scene.duration_s <= 5.0


def sounding(frame: np.ndarray) -> np.ndarray:
    """Where a saturated cut-out covers the grey background."""
    return frame.max(axis=2).astype(int) - frame.min(axis=2) > 120


@pytest.mark.parametrize("task", ["s4", "ms3", "ref_avs"])
def test_masks_lie_on_their_objects(test_scenes: TaskScenes, task: str) -> None:
    for index in range(6):
        scene = test_scenes.scene(task, index)
        answer, record = scene.samples[0].answer, scene.samples[0].metadata
        assert scene.mask is not None and scene.picture is not None
        if record.get("split") == "test_n":
            assert not scene.mask.any() and "<answer>false</answer>" in answer and "[" not in answer
            continue
        assert scene.mask.any() and record["a_obj"] in answer
        assert sounding(np.asarray(scene.picture))[scene.mask].mean() > 0.97
        boxes = re.findall(r"\[(\d+),(\d+),(\d+),(\d+)\]", answer)
        x1, y1, x2, y2 = map(int, boxes[0])
        mask = squared(scene.mask)
        assert box_of(mask) == (x1, y1, x2, y2) and x2 < 224 and y2 < 224
        points = re.findall(r"\[(\d+),(\d+)\]", answer)
        assert len(points) == 3 and all(mask[int(y), int(x)] for x, y in points)


def test_sounding_objects_are_masked(test_scenes: TaskScenes) -> None:
    for index in range(4):
        single, several = test_scenes.scene("s4", index), test_scenes.scene("ms3", index)
        assert single.samples[0].metadata["a_obj"] == single.facts["classes heard"][0]
        assert several.samples[0].metadata["a_obj"].split(" and ") == several.facts["classes heard"]


def test_expressions(test_scenes: TaskScenes, train_scenes: TaskScenes) -> None:
    splits = [test_scenes.scene("ref_avs", i).samples[0].metadata["split"] for i in range(6)]
    assert splits == ["test_s", "test_u", "test_n"] * 2
    seen = set()
    for index in range(24):
        scene = train_scenes.scene("ref_avs", index)
        record, here = scene.samples[0].metadata, scene.facts["classes in view"]
        text, exists = record["description"], scene.facts["the object exists"]
        seen.add(exists)
        assert exists == bool(record["a_obj"]) == scene.mask.any()
        if exists and "making a sound" in text:
            assert record["a_obj"] in scene.facts["classes heard"]
        if exists and "silent" in text:
            assert record["a_obj"] not in scene.facts["classes heard"]
        if exists and text.endswith("on the left"):
            assert here[0] == record["a_obj"]
        if not exists and (match := re.fullmatch(r"the (\w+)", text)):
            assert match[1] not in here
    assert seen == {True, False}


def test_some_classes_are_kept_from_training_expressions() -> None:
    labels = [f"class {i}" for i in range(400)]
    assert 0.1 < sum(map(is_unseen, labels)) / 400 < 0.22


def test_points_and_boxes_of_masks() -> None:
    first, second = np.zeros((224, 224), bool), np.zeros((224, 224), bool)
    first[50:120, 30:200] = True
    second[200:224, 215:224] = True
    assert box_of(first) == (30, 50, 200, 120) and box_of(second) == (215, 200, 223, 223)
    assert box_of(np.zeros((224, 224), bool)) is None
    points = points_of([first])
    assert len(set(points)) == 3 and all(first[int(y), int(x)] for x, y in points)
    assert max(x for x, _ in points) - min(x for x, _ in points) > 60
    spread = points_of([second, first])
    assert [bool(first[int(y), int(x)]) for x, y in spread] == [True, False, True]
    assert points_of([np.zeros((224, 224), bool)]) == ()


def test_untrimmed_events_sound_when_they_should(test_scenes: TaskScenes) -> None:
    several = 0
    for index in range(6):
        scene = test_scenes.scene("unav", index)
        events = scene.samples[0].metadata["original_label"]
        several += len(events) > 1
        assert {e["label"] for e in events} == set(scene.facts["classes in view"])
        if set(scene.facts["classes heard"]) != {e["label"] for e in events}:
            continue
        power = np.sqrt((scene.waves[0].reshape(-1, 1600) ** 2).mean(axis=1))
        active = np.zeros(power.size, bool)
        for event in events:
            start, end = event["segment"]
            assert 0 <= start < end <= 10
            active[round(start * 10) : round(end * 10)] = True
        if not active.all():
            assert power[active].mean() > 3 * power[~active].max()
    assert several >= 3


def test_four_options(test_scenes: TaskScenes) -> None:
    kinds = set()
    for index in range(16):
        sample = test_scenes.scene("avqa_thu", index).samples[0]
        record = sample.metadata
        kinds.add(record["question_type"])
        assert len(set(record["multi_choice"])) == 4 and record["answer"] in record["multi_choice"]
        assert sample.answer == f"<answer>{record['answer']}</answer>"
    assert len(kinds) >= 4


def test_music_questions_have_the_right_answers() -> None:
    players = [
        Player("violin", "left", (0, 10), 4.5),
        Player("piano", "middle", None),
        Player("trumpet", "right", (3, 7), -4.5),
        Player("harp", None, (5, 10), 0.0),
    ]
    asked: dict[str, str] = {}
    for seed in range(12):
        for _, _, text, answer in questions(players, 10, np.random.default_rng(seed)):
            assert asked.setdefault(text, answer) == answer
            assert any(re.fullmatch(t, text) for t in question_templates()), text
    expected = {
        "How many musical instruments can be heard in the video?": "three",
        "How many musical instruments can be seen in the video?": "three",
        "How many of the instruments in the video are playing?": "two",
        "How many of the instruments in the video stay silent?": "one",
        "Does all the music come from instruments in the video?": "no",
        "Where does the piano stand?": "middle",
        "Which instrument stands on the right?": "trumpet",
        "Does the violin in the video play all the time?": "yes",
        "Does the trumpet in the video play all the time?": "no",
        "Is the violin louder than the trumpet?": "yes",
        "Is the trumpet louder than the violin?": "no",
        "Does the trumpet play longer than the violin?": "no",
        "Where is the loudest instrument?": "left",
        "Where is the instrument that starts first?": "left",
        "Is the instrument on the left louder than the one on the right?": "yes",
        "Does the instrument on the left play longer than the one on the right?": "yes",
        "Which instrument starts first?": "violin",
        "Which instrument starts after the violin?": "trumpet",
    }
    assert expected.items() <= asked.items()


def test_refusals(catalogue: Catalogue, extras: Extras) -> None:
    bare = TaskScenes(SceneSource(catalogue, "test"))
    assert bare.scene("s4", 0).picture is not None
    assert needing_extras() == {"ks", "ucf", "meld", "mer24", "cremad", "mafw", "dfew"}
    with pytest.raises(InputError, match="scenes fetch"):
        bare.scene("meld", 0)
    with pytest.raises(TaskError, match="nonesuch"):
        bare.scene("nonesuch", 0)

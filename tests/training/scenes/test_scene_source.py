"""Scenes are what their truth says, and the splits share nothing they shouldn't."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.errors import InputError
from crab_edge.results import Box, Choice, Event
from crab_edge.training.scenes import QUESTION_TEMPLATES, Catalogue, SceneSource
from crab_edge.training.scenes.source import frame_times

CLIPS = 14


def equal(a, b) -> bool:  # type: ignore[no-untyped-def]
    same = a.samples == b.samples and a.boxes == b.boxes and a.sounds == b.sounds
    return same and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        if getattr(a, name) is not None
        else getattr(b, name) is None
        for name in ("frames", "image", "wave")
    )


def test_same_number_same_scene(catalogue: Catalogue) -> None:
    first, second = SceneSource(catalogue, "train"), SceneSource(catalogue, "train")
    for index in (5, 0, 3):
        assert equal(first.clip(index), second.clip(index))
        assert equal(first.still(index), second.still(index))
        assert np.array_equal(first.audio(index)[0], second.audio(index)[0])
    assert not equal(first.clip(0), first.clip(1))
    assert not equal(first.clip(0), SceneSource(catalogue, "train", seed=1).clip(0))
    assert equal(first.clip(2), pickle.loads(pickle.dumps(first)).clip(2))


def used(source: SceneSource) -> tuple[set[str], set[str], set[int]]:
    """Keys of pictures and recordings, grey levels of backgrounds that the first scenes show."""
    pictures, sounds = set(), set()
    for index in range(CLIPS):
        scene = source.clip(index)
        assert scene.stage is not None
        pictures |= {thing.picture.key for thing in scene.stage.things}
    planner = source.planner
    for index in range(CLIPS):
        stage, events = planner.plan(np.random.default_rng(index), "double", 10.0)
        sounds |= {event.asset.key for event in events}
        pictures |= {thing.picture.key for thing in stage.things}
    return pictures, sounds, {b.pack[0] for b in planner.backgrounds}


def test_splits_share_no_picture_recording_or_background(catalogue: Catalogue) -> None:
    train, known = used(SceneSource(catalogue, "train")), used(SceneSource(catalogue, "test"))
    unseen = used(SceneSource(catalogue, "test", "unseen"))
    assert not train[0] & known[0] and not train[0] & unseen[0]
    assert not train[2] & known[2]
    assert known[1] <= {a.key for c in catalogue.classes for a in c.sounds if not a.test}
    assert not train[1] & unseen[1] and unseen[1]


def shown(frame: np.ndarray) -> np.ndarray:
    """Where a saturated cut-out covers the grey background."""
    return frame.max(axis=2).astype(int) - frame.min(axis=2) > 120


def test_box_is_where_the_picture_is(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "test")
    alone = [s for s in map(source.still, range(30)) if len(s.boxes) == 1]
    assert len(alone) >= 3
    for scene in alone:
        assert scene.image is not None
        rows, columns = np.nonzero(shown(scene.image))
        _, x1, y1, x2, y2, _, _ = scene.boxes[0]
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.array(found) - (x1, y1, x2, y2)).max() <= 5, (found, scene.boxes)


def test_objects_are_in_the_frames_of_their_seconds(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "train")
    checked = 0
    for index in range(40):
        scene = source.clip(index)
        if scene.frames is None or scene.stage is None or len(scene.stage.things) != 1:
            continue
        (thing,) = scene.stage.things
        for frame, time in zip(scene.frames, frame_times(scene.duration_s), strict=True):
            visible = thing.visible[0] <= time < thing.visible[1]
            assert shown(frame).any() == visible
        fact = scene.truth.seen()[0]
        assert abs(fact.seen[0] - max(thing.visible[0], 0)) <= 0.5
        assert fact.seen[1] - fact.seen[0] >= 1
        checked += 1
    assert checked >= 3


def test_sound_is_in_its_seconds(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "test")
    for index in range(20):
        wave, events = source.audio(index)
        assert wave.dtype == np.float32 and np.abs(wave).max() <= 1.0 and len(events) in (1, 2, 3)
        power = np.sqrt((wave.reshape(-1, 800) ** 2).mean(axis=1))
        times = (np.arange(power.size) + 0.5) * 800 / 16000
        active = np.zeros(power.size, bool)
        for _, start, end in events:
            active |= (times > start - 0.06) & (times < end + 0.06)
        if not active.all():
            assert power[active].mean() > 3 * power[~active].max()


def test_answers_say_the_truth(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "train")
    seen_tasks = set()
    for index in range(CLIPS):
        for scene in (source.clip(index), source.still(index), source.clip(index, focus="ave")):
            truth = scene.truth
            for sample in scene.samples:
                seen_tasks.add(sample.task)
                parsed = tasks.get(sample.task).parse(sample.answer, tasks.base.MODEL_CONTEXT)
                assert sample.lead.startswith("This is a")
                assert ("audio" in sample.lead) == (scene.wave is not None)
                if sample.task == "ave":
                    (event,) = parsed
                    assert isinstance(event, Event)
                    (fact,) = truth.both()
                    assert (event.label, event.start_s, event.end_s) == (fact.label, *fact.overlap())
                elif sample.task == "arig":
                    (box,) = parsed
                    assert isinstance(box, Box)
                    assert (box.label, box.x1, box.y1, box.x2, box.y2) in {row[:5] for row in scene.boxes}
                    assert [s[0] for s in scene.sounds] == [box.label]
                elif sample.task == "avqa":
                    assert isinstance(parsed[0], Choice) and parsed[0].value == sample.metadata["answer"]
                    question = sample.metadata["question"]
                    assert any(re.fullmatch(t, question) for t in QUESTION_TEMPLATES), question
            asked = {s.metadata["question"]: s.metadata["answer"] for s in scene.samples if s.task == "avqa"}
            for question, answer in asked.items():
                labels = {f.label for f in (truth.seen() if "there" in question else truth.heard())}
                named = [word for word in labels if re.search(rf"\b{word}\b", question)]
                if question.startswith(("Is there", "Are there", "Can you hear")):
                    assert (answer == "yes") == bool(named)
                if question.startswith("How many objects"):
                    assert answer == ("zero", "one", "two", "three")[len(truth.seen())]
    assert seen_tasks == {"ave", "avvp", "arig", "avqa", "avcap"}


def test_focus_ave_has_one_event(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "test")
    assert all(source.clip(i, focus="ave").sample("ave") for i in range(10))


def test_test_scenes_keep_the_rules(catalogue: Catalogue) -> None:
    source = SceneSource(catalogue, "test")
    silent, stills = 0, [source.still(i) for i in range(40)]
    for scene in stills:
        assert 1 <= len(scene.boxes) <= 3 and len(scene.sounds) == 1
        assert scene.sounds[0][0] in {row[0] for row in scene.boxes}
        silent += len(scene.boxes) > 1
        for _, x1, y1, x2, y2, _, _ in scene.boxes:
            assert 0 <= x1 < x2 <= 224 and 0 <= y1 < y2 <= 224
            assert 0.19 <= max(x2 - x1, y2 - y1) / 224 <= 0.71
    assert silent >= 20
    clips = [source.clip(i) for i in range(12)]
    assert all(c.frames is not None and c.wave is not None and 2 <= c.duration_s <= 10 for c in clips)
    assert len({c.duration_s for c in clips}) > 2


def test_training_has_clips_that_lack_a_stream(catalogue: Catalogue) -> None:
    clips = [SceneSource(catalogue, "train").clip(i) for i in range(30)]
    mute, blind = [c for c in clips if c.wave is None], [c for c in clips if c.frames is None]
    assert mute and blind
    assert all(s.lead == "This is a video:" for c in mute for s in c.samples)
    assert all(s.lead == "This is an audio:" and "<visual" not in s.answer for c in blind for s in c.samples)
    assert all(not c.boxes for c in blind) and all(not c.sounds for c in mute)


def test_frame_times_are_those_of_the_reference() -> None:
    assert [round(t * 8) for t in frame_times(10.0)] == list(np.round(np.linspace(0, 79, 10)).astype(int))
    assert len(frame_times(0.1)) == 10


def test_unknown_split(catalogue: Catalogue) -> None:
    with pytest.raises(InputError, match="train or test"):
        SceneSource(catalogue, "valid")  # type: ignore[arg-type]

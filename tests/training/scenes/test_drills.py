"""Drills: true, balanced, and with the lead sentence of the scene's own samples."""

import numpy as np

from crab_edge import tasks
from crab_edge.results import Box
from crab_edge.tasks import MediaContext
from crab_edge.training.scenes.drills import Drills, drills
from crab_edge.training.scenes.facts import Fact, Truth, Vocabulary

ROWS = (("dog", "a", "animal"), ("cat", "a", "animal"), ("grapes", "", "food"), ("bell", "a", "thing"))
VOCABULARY = Vocabulary(heard=(ROWS[0], ROWS[1], ROWS[3]), seen=ROWS)


def _fact(label, article, seen, heard, box=(10, 20, 60, 90), side="left"):
    return Fact(label, article, "sounds", label != "grapes", seen, heard, side=side, box=box)


IMAGE = Truth(
    [
        _fact("dog", "a", (0, 5), (0, 5), (10, 20, 60, 90)),
        _fact("grapes", "", (0, 5), None, (100, 0, 224, 100), "right"),
    ],
    5.0,
    "image",
    True,
)


def _answers(truth, seed=0, limit=4):
    return drills(truth, VOCABULARY, np.random.default_rng(seed), limit)


def test_every_object_of_a_picture_is_asked_for_its_box_and_only_the_coordinates_count():
    boxes = [s for s in _answers(IMAGE) if s.task == "arig"]
    about = MediaContext(224, 224, 5.0)
    found = {
        r.label: (r.x1, r.y1, r.x2, r.y2) for s in boxes for r in tasks.get("arig").parse(s.answer, about)
    }
    assert found == {"dog": (10, 20, 60, 90), "grapes": (100, 0, 224, 100)}
    assert all(s.metadata == {"loss": "coordinates"} for s in boxes)
    assert all(isinstance(r, Box) for s in boxes for r in tasks.get("arig").parse(s.answer, about))


def test_what_is_said_is_true_and_yes_is_as_frequent_as_no():
    for seed in range(20):
        asked = [s for s in _answers(IMAGE, seed) if s.task == "avqa"]
        for verb, present in (("there", {"dog", "grapes"}), ("hear", {"dog"})):
            own = [s for s in asked if f" {verb} " in s.instruction]
            for sample in own:
                is_there = any(f" {label}" in sample.instruction for label in present)
                assert sample.answer == f"<answer>{'yes' if is_there else 'no'}</answer>", sample
            assert 2 * sum("yes" in s.answer for s in own) == len(own) > 0
        assert {s.answer for s in asked if "making a sound" in s.instruction} == {"<answer>yes</answer>"}
        assert {s.answer for s in asked if "Where" in s.instruction} == {
            "<answer>left</answer>",
            "<answer>right</answer>",
        }


def test_plurals_and_silence():
    asked = [s.instruction for s in _answers(IMAGE)]
    assert any(q.endswith("Are there grapes in the image?") for q in asked)
    assert any(q.endswith("Where are the grapes?") for q in asked)
    silent = Truth([_fact("dog", "a", (0, 5), None)], 5.0, "video", False)
    asked = _answers(silent)
    assert asked and not any("hear" in s.instruction or s.task == "arig" for s in asked)
    assert {s.lead for s in asked} == {"This is a video:"}


def test_only_drills_with_the_scenes_lead_are_taken():
    class Scene:
        truth = IMAGE

    take = Drills(VOCABULARY, 4)
    random = np.random.default_rng(1)
    assert take(Scene(), "This is an image and an audio:", random)
    assert take(Scene(), "This is an audio:", random) == []


def test_two_of_a_kind_are_not_asked_for():
    twice = Truth([_fact("dog", "a", (0, 5), None), _fact("dog", "a", (0, 5), None)], 5.0, "image", True)
    assert not [s for s in _answers(twice) if s.task == "arig" or "Where" in s.instruction]

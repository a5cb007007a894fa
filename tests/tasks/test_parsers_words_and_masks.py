"""Answers of matching, emotion, action and segmentation tasks: the official forms, and nonsense."""

import sys
import types

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.results import Box, Choice, Mask, Points, Unparsed
from crab_edge.tasks import MediaContext


def parse(name, text, **context):
    return tasks.get(name).parse(text, MediaContext(**context))


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("1", "1"),
        (" Two ", "2"),
        ("first", "1"),
        ("the second video", "2"),
        ("video1", "1"),
        ("Audio 2.", "2"),
        ("2nd", "2"),
        ("one</answer> no: <answer>two", "2"),
    ],
)
@pytest.mark.parametrize("name", ["a2v", "v2a"])
def test_matching_forms(name, said, value):
    assert parse(name, f"I hear a dog. <answer>{said}</answer>.") == (Choice(value),)


@pytest.mark.parametrize("said", ["1 or 2", "12", "none", "1.5", "the former", "one of the two", "anyone"])
def test_matching_nonsense(said):
    assert parse("a2v", f"<answer>{said}</answer>") == (Unparsed(f"neither 1 nor 2: '{said}'"),)
    assert parse("a2v", "the first") == (Unparsed("no <answer> in 'the first'"),)


@pytest.mark.parametrize("name", ["meld", "mer24", "cremad", "mafw", "dfew", "ks", "ucf", "avqa_thu"])
def test_words(name):
    assert parse(name, "She smiles. <answer> Happy </answer>.") == (Choice("happy"),)
    assert isinstance(parse(name, "She is happy.")[0], Unparsed)


AVS = "The object making the sound in the video is dog. Its bounding box is [10,20,112,223]"
THREE = ((20.0, 30.0), (40.0, 50.0), (60.0, 70.0))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (f"{AVS} and its points are [20,30],[40,50],[60,70].", "dog"),
        (f"At [1,2] there is a cat. {AVS}, its points are [20,30] [40,50] [60,70]</s>[9,9]", "dog"),
        ("It is <obj>(10,20)(112,223)</obj>: [20,30], [ 40 , 50 ] and (60,70)", ""),
        (f"{AVS} and [1,2,3,4], three pixel points: [20,30],[40,50],[60,70]", "dog"),
    ],
)
def test_segmentation_forms(text, label):
    for name in ("s4", "ms3"):
        assert parse(name, text) == (Box(label, 10, 20, 112, 223), Points(label, THREE))
    scaled = parse("s4", text, width=448, height=112)
    assert scaled[0] == Box(label, 20, 10, 224, 111.5)
    assert scaled[1] == Points(label, ((40, 15), (80, 25), (120, 35)))


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("The object making the sound in the video is dog.", (Choice,), "no box and no points in "),
        ("woof", (), "no box and no points in 'woof'"),
        (f"{AVS}.", (Box,), "no points on the object"),
        ("[1,2],[3,4]", (Points,), "no box, and 2 of 3 points"),
        ("[9,9,1,20] [1,2],[3,4],[5,6]", (Points,), "the box (9,9)(1,20) is reversed"),
        ("[1,1,9,225] [1,2],[3,4],[5,6]", (Points,), "the box (1,1)(9,225) leaves the 224x224 frame"),
        ("[1,1,9,9] [1,2],[3,4],[224,6]", (Box, Points), "the point (224,6) leaves the 224x224 frame"),
        ("[1,1,9,9] [-1,2]", (Box,), "the point (-1,2) leaves the 224x224 frame"),
    ],
)
def test_segmentation_nonsense_keeps_its_reason(text, kinds, reason):
    found = parse("s4", text)
    assert [type(result) for result in found if not isinstance(result, Unparsed)] == list(kinds)
    (bad,) = [result for result in found if isinstance(result, Unparsed)]
    assert bad.reason.startswith(reason)


def test_points_without_a_box_need_three():
    assert parse("s4", "[20,30],[40,50],[60,70]") == (Points("", THREE),)


def test_a_referred_object_is_there_or_not():
    text = (
        "<answer>true</answer> The object is red guitar. "
        "Its bounding box is [1,2,3,4] and its points are [2,3]."
    )
    box, point = Box("red guitar", 1, 2, 3, 4), Points("red guitar", ((2, 3),))
    assert parse("ref_avs", text) == (Choice("true"), box, point)
    assert tasks.get("ref_avs").render(parse("ref_avs", text)) == text
    assert parse("ref_avs", "<answer> True. </answer>[1,2,3,4]") == (Choice("true"), Box("", 1, 2, 3, 4))
    assert parse("ref_avs", "<answer>true</answer> here") == (
        Choice("true"),
        Unparsed("no box and no points"),
    )
    assert parse("ref_avs", "<answer>false</answer> [1,2,3,4]") == (Choice("false"),)
    assert parse("ref_avs", "true [1,2,3,4]") == (
        Unparsed("neither true nor false in an <answer>: 'true [1,2,3,4]'"),
    )


def test_rendering_gives_one_text():
    render = tasks.get("s4").render
    assert render([Box("dog", 10.4, 20, 30.6, 40), Points("dog", ((11, 22), (12.6, 223.9)))]) == (
        "The object making the sound in the video is dog. "
        "Its bounding box is [10,20,31,40] and its points are [11,22],[13,223]."
    )
    assert render([Choice("dog")]) == "The object making the sound in the video is dog."
    assert tasks.get("ref_avs").render([Choice("false")]) == ("<answer>false</answer> The object is absent.")
    assert tasks.get("a2v").render([Choice("2")]) == "<answer>2</answer>"


def test_masks_are_made_of_what_the_model_pointed_at(monkeypatch):
    masks = types.ModuleType("crab_edge.masks")
    given = []

    def segment(picture, box, points):
        given.append((picture.shape, box, points))
        return Mask("dog", 2, 3, (6,), "stand-in")

    masks.segment = segment
    monkeypatch.setitem(sys.modules, "crab_edge.masks", masks)
    finish, picture = tasks.get("ref_avs").finish, np.zeros((2, 3, 3), np.uint8)
    box = Box("dog", 0, 0, 1, 1)
    assert finish((Choice("true"), box), picture) == (
        Choice("true"),
        box,
        Mask("dog", 2, 3, (6,), "stand-in"),
    )
    assert finish((Choice("false"),), picture) == (Choice("false"),)
    assert given == [((2, 3, 3), box, None)]

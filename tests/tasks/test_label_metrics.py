"""Weighted F1, WAR and UAR, multiple choice and UnAV's events on cases computed by hand."""

import pytest

from crab_edge.results import Choice, Event, Unparsed
from crab_edge.tasks import metrics
from crab_edge.tasks.metrics import Sample, labels, unav


def figures(name, samples):
    return {figure.name: figure for figure in metrics.get(name).figures(samples)}


def said(truth, label, **record):
    predicted = (Unparsed("?"),) if label is None else (Choice(label),)
    return Sample((Choice(truth),), predicted, record=record)


EMOTIONS = [
    said("anger", "anger"),
    said("anger", "anger"),
    said("anger", "joy"),
    said("joy", "joy"),
    said("fear", None),
    said("fear", "boredom"),
]


def test_weighted_f1_by_hand():
    found = figures("weighted-f1", EMOTIONS)
    # anger: TP 2 FN 1 -> 4/5, three of six; joy: TP 1 FP 1 -> 2/3, one of six; fear: 0.
    assert found["weighted F1"].value == pytest.approx(100 * (3 * 0.8 + 1 * 2 / 3) / 6)
    assert found["accuracy"].value == 50.0
    # Always anger: F1 = 2*3 / (3 + 6) of half the weight.
    assert found["weighted F1"].baseline == pytest.approx(100 * (3 * 6 / 9) / 6)
    assert found["weighted F1"].baseline_name == "majority class (anger)"


def test_war_and_uar_by_hand():
    found = figures("war-uar", EMOTIONS)
    assert found["WAR"].value == 50.0 and found["WAR"].baseline == 50.0
    assert found["UAR"].value == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert found["UAR"].baseline == pytest.approx(100 / 3)
    assert found["UAR"].classes == 3


def test_a_class_that_only_the_predictions_have_doesnt_count():
    truths, told = ["a", "a"], ["a", "b"]
    assert labels.recalls(truths, told) == {"a": 0.5}
    assert labels.weighted_f1(truths, told) == pytest.approx(2 / 3)
    assert labels.weighted_f1([], []) == 0.0


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("2", "A cat", 1.0),  # the truth as an index from 0
        ("cat", "cat", 1.0),
        ("2", "c", 1.0),
        ("2", "C. cat", 1.0),
        ("2", "c dog", 0.0),  # letter and text disagree
        ("2", "2", 0.0),  # an answer's digit isn't an index: people count from 1
        ("2", "dog", 0.0),
        ("2", None, 0.0),
        ("7", "cat", 0.0),
    ],
)
@pytest.mark.parametrize("options", [["dog", "4", "cat", "cow"], "['dog', '4', 'cat', 'cow']"])
def test_multiple_choice(truth, answer, right, options):
    assert labels.right(said(truth, answer, multi_choice=options)) == right


def test_a_number_that_is_an_option_is_that_option():
    assert labels.right(said("1", "one", multi_choice=["3", "1"])) == 1.0
    assert labels.options_of({"multi_choice": "no list"}) == []


# UnAV


def ev(label, start, end):
    return Event(label, start, end, "audio-visual")


def test_temporal_iou():
    assert unav.t_iou((0, 4), (2, 6)) == pytest.approx(2 / 6)
    assert unav.t_iou((0, 2), (2, 4)) == 0.0


def test_unav_by_hand():
    samples = [
        Sample((ev("dog", 0, 4), ev("dog", 6, 8), ev("cat", 0, 10)), (ev("dog", 0, 3), ev("cow", 0, 1))),
        Sample((ev("dog", 1, 3),), (ev("dog", 1, 3), ev("dog", 5, 6))),
    ]
    # dog: three true, three said, two matched at 0.5 (0..3 against 0..4 has 0.75); cat missed; cow false.
    assert unav.counts(samples, 0.5) == {"dog": (2, 3, 3), "cat": (0, 0, 1), "cow": (0, 1, 0)}
    found = figures("unav", samples)
    assert found["event F1@0.5"].value == pytest.approx(100 * 4 / 8)
    # AP of dog is 2/3 x 2/3, of cat 0; cow isn't a class of the truth.
    assert found["mAP@0.5 (unranked)"].value == pytest.approx(100 * (4 / 9) / 2)
    # From 0.8 on, only the exact span is left: 1/3 x 1/3.
    average = (7 * 4 / 9 + 2 * 1 / 9) / 9 / 2
    assert found["mAP@0.1:0.9 (unranked)"].value == pytest.approx(100 * average)
    assert found["event F1@0.5"].classes == 2


def test_unav_matches_one_to_one_and_forgets_repetitions():
    assert unav.matches([(0, 4), (0, 5)], [(0, 4)], 0.5) == 1
    assert unav.spans([ev("dog", 0, 4), ev("Dog", 0, 4)]) == {"dog": [(0, 4)]}


def test_unav_of_nothing():
    assert unav.f1([Sample((), (Unparsed("?"),))]) == 1.0
    assert unav.f1([Sample((ev("dog", 0, 1),), ())]) == 0.0
    assert unav.mean_ap([Sample((), ())], 0.5) == 0.0
    assert [figure.value for figure in metrics.get("unav").figures([Sample((), ())])] == [100.0, 0.0, 0.0]

"""J, F and S of masks by hand, in both conventions, invalid answers counted both ways."""

import math

import numpy as np
import pytest

from crab_edge.masks import from_bits
from crab_edge.results import Box, Choice, Points, Unparsed
from crab_edge.tasks import metrics
from crab_edge.tasks.metrics import Sample, avs
from crab_edge.tasks.metrics import mask_scores as one


def figures(name, samples):
    return {figure.name: figure for figure in metrics.get(name).figures(samples)}


def bits(*spans, size=10):
    """bool [10, 10] whose rows from..to (exclusive) are set."""
    out = np.zeros((size, size), bool)
    for start, end in spans:
        out[start:end] = True
    return out


def mask(*spans, size=10):
    return from_bits(bits(*spans, size=size), "dog", "test")


POINT = Points("dog", ((5, 5),))
BOX = Box("dog", 0, 0, 100, 100)


def test_j_and_f_by_hand():
    said, truth = bits((0, 4)), bits((2, 8))
    assert one.jaccard(said, truth) == pytest.approx(20 / 80)
    precision, recall = 20 / 40, 20 / 60
    assert one.f_score(said, truth) == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))


def test_empty_masks_in_both_conventions():
    empty, some = bits(), bits((0, 3))
    assert one.jaccard(empty, empty) == 1.0 and one.f_score(empty, empty) == 1.0
    assert one.jaccard(some, empty) == 0.0 and one.f_score(some, empty) == 0.0
    assert one.jaccard(empty, some) == 0.0 and one.f_score(empty, some) == 0.0
    # AVSBench: 30 of 100 pixels are wrongly predicted.
    assert one.inverse_jaccard(some, empty) == pytest.approx(0.7)
    assert one.inverse_jaccard(empty, empty) == 1.0
    assert one.inverse_jaccard(some, some) == 1.0
    assert one.f_curve(some, empty) is None
    # The whole picture at threshold 0: precision 0.3, recall 1.
    assert one.f_curve(empty, some) == (pytest.approx(1.3 * 0.3 / (0.3 * 0.3 + 1)), 0.0)


def test_s_of_null():
    quarter = bits((0, 2)) | np.zeros((10, 10), bool)
    assert one.s_of_null(quarter) == pytest.approx(math.sqrt(0.2))
    assert one.s_of_null_crab(quarter) == pytest.approx(math.sqrt(20 / 80))
    assert one.s_of_null(bits()) == one.s_of_null_crab(bits()) == 0.0
    assert one.s_of_null(bits((0, 10))) == 1.0 and one.s_of_null_crab(bits((0, 10))) == math.inf


@pytest.mark.parametrize(
    ("results", "s4", "ref"),
    [
        ((BOX, POINT), True, True),
        ((BOX,), False, True),
        ((POINT,), False, True),
        ((Points("dog", ((1, 1), (2, 2), (3, 3))),), True, True),
        ((Box("dog", 0, 0, 224, 100), POINT), False, False),  # the reference drops the edge
        ((BOX, Points("dog", ((5, 224),))), False, False),
        ((BOX, POINT, Unparsed("reversed")), False, False),
        ((Choice("true"),), False, False),
        ((Choice("false"),), False, True),
        ((Unparsed("?"),), False, False),
    ],
)
def test_valid_answers(results, s4, ref):
    assert avs.valid_avs(results) is s4
    assert avs.valid_ref(results) is ref


def test_avs_figures_with_invalid_counted_both_ways():
    truth = (mask((0, 5)),)
    samples = [
        Sample(truth, (BOX, POINT, mask((0, 5)))),  # J 1, F 1
        Sample(truth, (BOX, POINT, mask((0, 10)))),  # J .5, precision .5, recall 1
        Sample(truth, (Unparsed("?"),)),
    ]
    found = figures("avs", samples)
    f = 1.3 * 0.5 / (0.3 * 0.5 + 1)
    # Stretched to 224, rows stay halves of the picture.
    assert found["J (valid only)"].value == pytest.approx(75.0) and found["J (valid only)"].n == 2
    assert found["F (valid only)"].value == pytest.approx(100 * (1 + f) / 2)
    assert found["J (invalid = 0)"].value == pytest.approx(50.0) and found["J (invalid = 0)"].n == 3
    assert found["F (invalid = 0)"].value == pytest.approx(100 * (1 + f) / 3)
    assert found["AVSBench mIoU (valid only)"].value == pytest.approx(75.0)
    assert found["AVSBench F-max (valid only)"].value == pytest.approx(100 * (1 + f) / 2)
    assert found["valid answers"].value == pytest.approx(200 / 3)
    assert found["J (valid only)"].baseline == pytest.approx(100.0)
    assert found["J (valid only)"].baseline_name == "best constant mask (pixels in 5 % of the truths)"
    assert [metrics.get("avs").score(sample) for sample in samples] == [1.0, 0.5, 0.0]


def test_avs_benchs_convention_on_empty_truths():
    samples = [
        Sample((mask(),), (BOX, POINT, mask((0, 5)))),  # inverse IoU .5, no F
        Sample((mask((0, 5)),), (BOX, POINT, mask((0, 5)))),
    ]
    found = figures("avs", samples)
    assert found["J (valid only)"].value == 50.0
    assert found["F (valid only)"].value == 50.0
    assert found["AVSBench mIoU (valid only)"].value == pytest.approx(75.0)
    assert found["AVSBench F-max (valid only)"].value == 100.0
    assert found["AVSBench F-max (valid only)"].n == 1


def test_f_max_takes_the_better_end_of_the_mean_curve():
    # Both masks miss, so that predicting everything is better: precision .5, recall 1.
    samples = [Sample((mask((0, 5)),), (BOX, POINT, mask((5, 10)))) for _ in range(2)]
    found = figures("avs", samples)
    assert found["F (valid only)"].value == 0.0
    assert found["AVSBench F-max (valid only)"].value == pytest.approx(100 * 1.3 * 0.5 / 1.15)


def test_a_box_at_the_edge_is_invalid_for_the_reference_and_scored_all_the_same():
    edge = Sample((mask((0, 5)),), (Box("dog", 0, 0, 224, 100), POINT, mask((0, 5))))
    found = figures("avs", [edge])
    assert found["J (valid only)"].n == 0 and found["J (valid only)"].value == 0.0
    assert found["J (invalid = 0)"].value == 100.0


def test_masks_of_several_objects_and_sizes_are_one_region():
    both = Sample((mask((0, 10)),), (BOX, POINT, mask((0, 5)), mask((10, 20), size=20)))
    assert figures("avs", [both])["J (invalid = 0)"].value == 100.0


def ref(split, truth, *predicted):
    return Sample(truth, predicted, record={"split": split})


def test_ref_avs_splits():
    truth = (mask((0, 5)),)
    samples = [
        ref("test_s", truth, Choice("true"), BOX, mask((0, 5))),
        ref("test_s", truth, Choice("false")),  # an empty mask, J 0
        ref("test_u", truth, Choice("true"), BOX, mask((0, 10))),
        ref("test_u", truth, Unparsed("no answer")),
        ref("test_n", (), Choice("false")),
        ref("test_n", (), Choice("true"), BOX, mask((0, 2))),
        ref("test_n", (), Unparsed("no answer")),
    ]
    found = figures("ref-avs", samples)
    assert found["seen J (valid only)"].value == 50.0 and found["seen J (valid only)"].n == 2
    assert found["unseen J (valid only)"].value == pytest.approx(50.0)
    assert found["unseen J (invalid = 0)"].value == pytest.approx(25.0)
    assert found["seen + unseen J (invalid = 0)"].value == pytest.approx(37.5)
    s = found["null S, lower is better (valid only)"]
    # The mask is stretched to 224: rows 0..1 of 10 become 45 of 224.
    area = 45 / 224
    assert s.value == pytest.approx(math.sqrt(area) / 2) and s.unit == "" and s.baseline == 0.0
    assert found["null S, lower is better (invalid = 1)"].value == pytest.approx((math.sqrt(area) + 1) / 3)
    crab = found["null S, lower is better (valid only, Crab+'s denominator)"].value
    assert crab == pytest.approx(math.sqrt(area / (1 - area)) / 2)
    assert found["valid answers"].value == pytest.approx(100 * 5 / 7)
    score = metrics.get("ref-avs").score
    assert score(samples[4]) == 1.0 and score(samples[6]) == 0.0
    assert score(samples[5]) == pytest.approx(1 - math.sqrt(area))


def test_a_full_mask_of_an_absent_object_drops_out_of_crabs_s():
    found = figures("ref-avs", [ref("test_n", (), Choice("true"), BOX, mask((0, 10)))])
    assert found["null S, lower is better (valid only)"].value == 1.0
    assert found["null S, lower is better (valid only, Crab+'s denominator)"].n == 0


@pytest.mark.parametrize(
    ("split", "name"), [("test_s", "seen"), ("unseen", "unseen"), ("test_n", "null"), ("null", "null")]
)
def test_split_names(split, name):
    assert avs.ref_split(ref(split, ())) == name


def test_without_a_split_the_truth_says_it():
    assert avs.ref_split(Sample((), ())) == "null"
    assert avs.ref_split(Sample((mask((0, 1)),), ())) == "seen"


def test_a_mask_alone_is_valid():
    found = figures("avs", [Sample((mask((0, 5)),), (mask((0, 5)),))])
    assert found["J (valid only)"].value == 100.0

"""Every metric on cases computed by hand, and the edge cases that the reference lists."""

import numpy as np
import pytest

from crab_edge.errors import TaskError
from crab_edge.results import Box, Caption, Choice, Event, Unparsed
from crab_edge.tasks import metrics
from crab_edge.tasks.metrics import Sample, captions, grounding, llp, music_avqa, segments, whole_seconds
from crab_edge.tasks.metrics.base import majority, normalised
from crab_edge.tasks.metrics.labels import accuracy
from crab_edge.tasks.metrics.paired import paired_difference


def figures(name, samples):
    return {figure.name: figure for figure in metrics.get(name).figures(samples)}


def ev(label, start, end, modality="audio-visual"):
    return Event(label, start, end, modality)


def test_unknown_metric_lists_the_names():
    with pytest.raises(TaskError, match="unknown metric 'bleu'; the metrics are accuracy, ave-segments"):
        metrics.get("bleu")


@pytest.mark.parametrize(
    ("seconds", "whole"), [(10.0, 10), (9.98, 10), (60.0, 10), (7.6, 7), (7.8, 8), (2.0, 2), (0.3, 1)]
)
def test_whole_seconds(seconds, whole):
    assert whole_seconds(seconds) == whole


@pytest.mark.parametrize(
    ("text", "same"),
    [("A dog.", "dog"), ("Frying_(food)", "frying food"), ("Two cats", "2 cats"), ("the", "the"), (" ", "")],
)
def test_normalised(text, same):
    assert normalised(text) == same


def test_majority_breaks_ties_by_name():
    assert majority(["b", "a", "a", "b", "c"]) == ("a", 2)
    assert majority([]) == ("", 0)


def test_accuracy():
    samples = [
        Sample((Choice("dog"),), (Choice("Dog."),)),
        Sample((Choice("dog"),), (Choice("cat"),)),
        Sample((Choice("cat"),), (Unparsed("?"),)),
        Sample((Choice("cow"),), (Unparsed("no box"), Box("cow", 0, 0, 1, 1))),
    ]
    figure = accuracy(samples)
    assert (figure.value, figure.baseline, figure.classes, figure.n) == (50.0, 50.0, 3, 4)
    assert figure.baseline_name == "majority class (dog)"


# AVE


def test_segments_follow_the_official_rule():
    labels = segments.segment_labels([ev("dog", 1, 3), ev("cat", 2, 4), ev("cow", 3.5, 5)], 6)
    # start <= k < end; where two events overlap the first one counts; a start of 3.5 misses second 3.
    assert labels == [None, "dog", "dog", "cat", "cow", None]


def test_ave_accuracy_counts_background_and_wrong_classes():
    samples = [
        Sample((ev("dog", 2, 7),), (ev("dog", 3, 8),)),  # wrong at 2 and 7: 8 of 10
        Sample((ev("dog", 0, 10),), (ev("cat", 0, 10),)),  # 0 of 10
        Sample((ev("cat", 0, 2),), (Unparsed("?"),), seconds=4),  # nothing said is background: 2 of 4
    ]
    assert segments.segment_score(samples[0]) == 0.8
    found = figures("ave-segments", samples)["segment accuracy"]
    assert found.value == pytest.approx(100 * 10 / 24)
    # Said from 0 to 7, dog is right in 5 + 3 background, 7 and 0 segments; no other range does better.
    assert found.baseline == pytest.approx(100 * 15 / 24)
    assert found.baseline_name == "always dog, (0 7)"
    assert found.classes == 2


def test_best_constant_event_may_be_silence():
    samples = [Sample((ev(name, start, start + 1),), ()) for start, name in enumerate("abc")]
    assert segments.best_constant_event(samples) == (90.0, "always background")


# LLP


def test_llp_segment_scores_by_hand():
    truth = (ev("dog", 0, 5, "visual"), ev("dog", 2, 6, "audio"), ev("cat", 0, 10, "audio"))
    said = (ev("dog", 0, 5, "visual"), ev("dog", 0, 4, "audio"), ev("cow", 0, 1, "visual"))
    a, v, av, kind, event = llp.video_scores(Sample(truth, said))
    # audio: dog TP 2 FP 2 FN 2 -> 0.5, cat FN 10 -> 0; cow has no audio and is left out.
    assert a == pytest.approx(0.25)
    # visual: dog 1, cow FP -> 0.
    assert v == pytest.approx(0.5)
    # audio-visual: truth dog 2..5, said 0..4: TP 2 FP 2 FN 1 -> 4/7.
    assert av == pytest.approx(4 / 7)
    assert kind == pytest.approx((0.25 + 0.5 + 4 / 7) / 3)
    # pooled: dog TP 7 FP 2 FN 2 -> 14/18, cat 0, cow 0.
    assert event == pytest.approx(14 / 18 / 3)


def test_llp_event_scores_by_hand():
    truth = (ev("dog", 0, 4, "audio"), ev("dog", 6, 10, "audio"))
    said = (ev("dog", 0, 2, "audio"), ev("dog", 7, 8, "audio"), ev("dog", 4, 6, "visual"))
    a, v, av, _, event = llp.video_scores(Sample(truth, said), "event")
    # (0 2) meets (0 4) with IoU 0.5 -> TP; (7 8) has IoU 0.25 -> FP; (6 10) is met by none -> FN.
    assert a == pytest.approx(2 / 4)
    assert v == 0.0
    assert av == 1.0  # neither has any audio-visual event
    assert event == pytest.approx(2 / (2 + 2 + 1))


def test_llp_events_are_not_matched_one_to_one():
    truth, said = np.zeros((2, 1, 10), bool)
    truth[0, 0:6] = True
    said[0, [0, 1, 2, 4, 5]] = True  # (0 3) has IoU 0.5, (4 6) a third
    assert llp.event_counts(said, truth).tolist() == [[1], [1], [0]]
    truth[0], said[0] = False, False
    truth[0, 0:2] = truth[0, 3:5] = said[0, 0:2] = said[0, 3:5] = True
    assert llp.event_counts(said, truth).tolist() == [[2], [0], [0]]


def test_llp_touching_events_become_one_run():
    grid = llp.grids([ev("dog", 0, 2, "audio"), ev("dog", 2, 4, "audio")], ["dog"], 10)
    assert llp.runs(grid.audio[0]) == [(0, 4)]
    assert llp.runs(np.ones(3, bool)) == [(0, 3)] and llp.runs(np.zeros(3, bool)) == []


def test_llp_of_nothing_is_one():
    assert llp.video_scores(Sample((), ())).tolist() == [1.0] * 5
    assert llp.video_scores(Sample((), (Unparsed("?"),)), "event").tolist() == [1.0] * 5
    assert llp.video_scores(Sample((), (ev("dog", 0, 1),))).tolist() == [0.0] * 5


def test_llp_scores_only_the_clips_own_seconds():
    truth, said = (ev("dog", 0, 4),), (ev("dog", 0, 10),)
    assert llp.video_scores(Sample(truth, said, seconds=4)).tolist() == [1.0] * 5
    assert llp.video_scores(Sample(truth, said, seconds=10))[0] == pytest.approx(8 / 14)


def test_llp_figures_average_over_videos():
    right = Sample((ev("dog", 0, 10),), (ev("dog", 0, 10),))
    wrong = Sample((ev("cat", 0, 10),), (ev("dog", 0, 10),))
    found = figures("llp", [right, wrong])
    assert [found[f"segment {name}"].value for name in llp.NAMES] == [50.0] * 5
    assert found["event Event@AV"].value == 50.0
    # One class right in one of two videos: 50; both at once: 2TP/(2TP+FP) averaged over two classes: 50.
    assert found["segment Type@AV"].baseline == pytest.approx(50.0)
    assert found["segment Type@AV"].classes == 2
    assert metrics.get("llp").score(right) == 1.0


def _type_av(samples, events):
    return np.mean([llp.video_scores(Sample(s.truth, events, s.seconds))[3] for s in samples])


def test_best_constant_events_matches_the_plain_metric():
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(12):
        events = [ev("dog", 1, 4)] if rng.random() < 0.8 else []
        if rng.random() < 0.5:
            start = int(rng.integers(0, 3))
            events.append(ev("cat", start, start + 2, "visual"))
        samples.append(Sample(tuple(events), (), seconds=int(rng.integers(3, 6))))
    search = llp._ConstantSearch(samples)
    chosen = []
    while (event := search.step()) is not None:
        chosen.append(event)
        assert search.best == pytest.approx(_type_av(samples, tuple(chosen)))
    assert chosen[0].label == "dog" and chosen[0].modality == "audio-visual"
    # The first step is the best single event: try them all the slow way.
    tried = [
        _type_av(samples, (ev(label, start, end, modality),))
        for label in ("dog", "cat")
        for start in range(5)
        for end in range(start + 1, 6)
        for modality in ("audio", "visual", "audio-visual")
    ]
    assert _type_av(samples, tuple(chosen[:1])) == pytest.approx(max(tried))


# Boxes


def test_iou():
    first = np.array([0.0, 0, 10, 10])
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [5, 5, 5, 5], [0, 0, 10, 5]], float)
    np.testing.assert_allclose(grounding.ious(first, others), [1, 1 / 3, 0, 0, 0.5])


def test_area_under_success_by_hand():
    assert grounding.area_under_success(np.array([1.0])) == pytest.approx(1.0)
    # Nothing but the threshold 0 is met: one trapezoid of width .05.
    assert grounding.area_under_success(np.array([0.0])) == pytest.approx(0.025)
    # Met up to 0.5 (eleven thresholds): 0.5 full, then one falling trapezoid.
    assert grounding.area_under_success(np.array([0.5])) == pytest.approx(0.525)
    assert grounding.area_under_success(np.array([1.0, 0.0])) == pytest.approx((1 + 0.025) / 2)


def test_grounding_figures():
    truth = (Box("dog", 0, 0, 100, 100),)
    samples = [
        Sample(truth, (Box("dog", 0, 0, 100, 50),)),  # IoU 0.5 counts
        Sample(truth, (Box("cat", 0, 0, 100, 49),)),
        Sample(truth, (Choice("dog"), Unparsed("no box"))),
        Sample((Box("cat", 120, 120, 220, 220),), (Unparsed("?"),)),
    ]
    found = figures("grounding", samples)
    assert found["label top-1"].value == 50.0 and found["label top-1"].baseline == 75.0
    share = found["cIoU (share IoU >= 0.5)"]
    assert share.value == 25.0 and share.baseline == 75.0
    assert share.baseline_name == "best constant box (0,0)(100,100)"
    assert [metrics.get("grounding").score(sample) for sample in samples] == [1.0, 0.0, 0.5, 0.0]


def test_best_constant_box_beats_every_true_box():
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 90, (200, 2))
    truth = np.concatenate([low, low + rng.uniform(60, 130, (200, 2))], axis=1)
    best = grounding.best_constant_box(truth)
    share = (grounding.ious(best, truth) >= 0.5).mean()
    assert share >= max((grounding.ious(box, truth) >= 0.5).mean() for box in truth)
    assert best.min() >= 0 and best.max() <= 224


# MUSIC-AVQA


@pytest.mark.parametrize(
    ("text", "same"),
    [("Two", "2"), ("2", "2"), ("Yes, it is.", "yes"), ("no", "no"), ("the Left", "left"), ("ten", "10")],
)
def test_same_answer(text, same):
    assert music_avqa.same_answer(text) == same


@pytest.mark.parametrize(
    ("value", "pair"),
    [
        ('["Audio-Visual", "Existential"]', ("audio-visual", "existential")),
        ("['Audio', 'Counting']", ("audio", "counting")),
        (["Visual", "Location"], ("visual", "location")),
        ("Existential", ("other", "existential")),
        (None, ("other", "other")),
    ],
)
def test_question_types(value, pair):
    assert music_avqa.question_type({"type": value}) == pair


def test_music_avqa_by_type_modality_and_overall():
    def sample(modality, kind, truth, said):
        return Sample((Choice(truth),), (Choice(said),), record={"type": [modality, kind]})

    samples = [
        sample("Audio", "Counting", "two", "2"),
        sample("Audio", "Counting", "two", "one"),
        sample("Audio", "Counting", "three", "three"),
        sample("Visual", "Counting", "one", "one"),
        sample("Audio-Visual", "Existential", "yes", "no"),
        Sample((Choice("no"),), (Unparsed("?"),), record={"type": ["Audio-Visual", "Existential"]}),
    ]
    found = figures("music-avqa", samples)
    assert found["overall"].value == 50.0 and found["overall"].n == 6
    assert found["overall"].baseline == pytest.approx(100 * 4 / 6)
    assert found["audio"].value == pytest.approx(200 / 3)
    assert found["counting"].value == 75.0 and found["counting"].baseline == 75.0
    assert found["existential"].value == 0.0 and found["existential"].baseline == 50.0
    assert found["audio counting"].n == 3 and found["visual counting"].value == 100.0


# Captions and differences


def test_rouge_l():
    assert captions.rouge_l("a dog barks".split(), "a dog barks".split()) == 1.0
    assert captions.rouge_l("the dog barks loud".split(), "a dog now barks".split()) == pytest.approx(0.5)
    assert captions.rouge_l([], ["a"]) == 0.0


def test_caption_figures():
    samples = [
        Sample((Caption("Dog barks"),), (Caption("dog barks"),)),
        Sample((Caption("Dog barks"),), (Unparsed("?"),)),
        Sample((Caption("cow"),), (Caption("a cow"),)),
    ]
    found = figures("caption", samples)["ROUGE-L F1"]
    assert found.value == pytest.approx(200 / 3)
    assert found.baseline == pytest.approx(200 / 3)
    assert found.baseline_name == "best constant caption (dog barks)"


def test_paired_difference():
    rng = np.random.default_rng(0)
    first = (rng.random(400) < 0.6).astype(float)
    second = first.copy()
    second[:8] = 1 - second[:8]
    found = paired_difference(first, second)
    assert found.points == pytest.approx(100 * (first.mean() - second.mean()))
    assert found.low <= found.points <= found.high and found.high - found.low < 4
    assert found.n == 400
    same = paired_difference([0.5, 1.0], [0.5, 1.0])
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)
    assert found == paired_difference(first, second)
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])

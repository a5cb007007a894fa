"""Results of several windows on one time line: what is joined, what stays, and the windows themselves."""

from itertools import pairwise

import pytest

from crab_edge.asked import stitched
from crab_edge.bundle import Bundle
from crab_edge.clip import Clip, Window
from crab_edge.errors import InputError
from crab_edge.results import Box, Caption, Choice, Event
from crab_edge.session import Model, Session
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle


def dog(start, end, label="dog", modality="audio"):
    return Event(label, start, end, modality)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake"))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return media.video(tmp_path_factory.mktemp("clips") / "long.mp4", seconds=23, fps=2)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([dog(2, 10)], [dog(10, 14)], [dog(2, 14)]),
        ([dog(2, 8)], [dog(5, 12)], [dog(2, 12)]),
        ([dog(6, 9)], [dog(5, 12)], [dog(5, 12)]),
        ([dog(2, 5)], [dog(5, 6)], [dog(2, 6)]),
        ([dog(2, 4)], [dog(5, 6)], [dog(2, 4), dog(5, 6)]),
        ([dog(2, 10)], [dog(5, 10, "cat")], [dog(2, 10), dog(5, 10, "cat")]),
        ([dog(2, 10)], [dog(5, 10, modality="visual")], [dog(2, 10), dog(5, 10, modality="visual")]),
        ([dog(5, 6), dog(8, 9)], [dog(5, 12)], [dog(5, 12)]),
        ([dog(0, 5), dog(3, 8)], [], [dog(0, 5), dog(3, 8)]),
        ([dog(0, 2), dog(2, 4)], [], [dog(0, 4)]),
        ([], [dog(6, 9), dog(7, 12)], [dog(6, 9), dog(7, 12)]),
        ([dog(1, 6), Caption("a")], [Caption("a"), dog(6, 9)], [dog(1, 9), Caption("a"), Caption("a")]),
    ],
)
def test_one_rule_for_events(first, second, expected):
    assert stitched([(0.0, first), (5.0, second)]) == expected


def test_an_event_grows_through_many_windows():
    windows = [(float(start), [dog(start, start + 10)]) for start in range(0, 5000, 5)]
    assert stitched(windows) == [dog(0, 5005)]
    apart = [(float(start), [dog(start, start + 1)]) for start in range(0, 5000, 5)]
    assert len(stitched(apart)) == 1000


def test_one_window_stays_as_it_is():
    assert stitched([(0.0, [dog(0, 2), dog(2, 4)])]) == [dog(0, 2), dog(2, 4)]


def test_an_event_said_twice_is_one():
    said = [dog(0, 2), Choice("dog"), dog(0, 2), dog(0, 3), Choice("dog")]
    assert stitched([(0.0, said)]) == [dog(0, 2), Choice("dog"), dog(0, 3), Choice("dog")]
    assert stitched([(0.0, said), (10.0, [dog(12, 13), dog(12, 13)])])[-1] == dog(12, 13)


def test_windows_with_a_stride(long):
    clip = Clip.open([long])
    end = clip.duration_s
    assert clip.windows(10, 10) == clip.windows() == [Window(0, 10), Window(10, 20), Window(20, end)]
    assert clip.windows(10, 5) == [Window(0, 10), Window(5, 15), Window(10, 20), Window(15, end)]
    assert clip.windows(10, 7)[-1] == Window(14, end)
    for stride in (1, 3, 5, 7, 10):
        cut = clip.windows(10, stride)
        assert cut[-1].end_s == end and all(w.end_s - w.start_s <= 11 for w in cut)
        assert all(b.start_s <= a.end_s for a, b in pairwise(cut)), "nothing is left out"


def test_overlapping_windows_give_one_time_line(bundle, long):
    texts = [f"<event>dog, ({a} {b})</event>" for a, b in ((2, 8), (1, 10), (0, 7), (5, 8))]
    engine = FakeEngine(bundle, texts)
    session = Session(Model(bundle, engine), Clip.open([long]), stride_s=5)
    answer = session.ask(task="ave")
    # Windows from 0, 5, 10 and 15 s: 2-8, 6-15, 10-17 and 20-23.
    assert [(event.start_s, event.end_s) for event in answer.parsed] == [(2, 17), (20, 23)]
    assert answer.raw == "\n".join(texts) and len(engine.vision_calls) == 4


def test_other_results_carry_their_window(bundle, long):
    session = Model(bundle, FakeEngine(bundle, "a dog")).open(long, stride_s=5)
    parsed = session.ask(task="avcap").parsed
    assert [caption.window for caption in parsed[:3]] == [(0, 10), (5, 15), (10, 20)]
    answer = session.ask(task="avcap").to_json()
    assert answer["parsed"][1] == {"type": "caption", "text": "a dog", "window": (5, 15)}
    assert (
        "window" not in Model(bundle, FakeEngine(bundle, "x")).open(long).ask("Is it?").to_json()["parsed"][0]
    )


def test_a_box_knows_its_window():
    from crab_edge.asked import dated

    assert dated(Box("dog", 0, 0, 1, 1), Window(5, 15)).window == (5, 15)
    assert dated(Box("dog", 0, 0, 1, 1), None).window is None
    assert dated(dog(6, 7), Window(5, 15)) == dog(6, 7)


@pytest.mark.parametrize("stride", [0, 0.5, -3, 10.5, float("nan")])
def test_strides_that_leave_gaps_are_refused(bundle, long, stride):
    with pytest.raises(InputError, match="stride"):
        Model(bundle, FakeEngine(bundle, "x")).open(long, stride_s=stride)

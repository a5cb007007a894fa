"""Properties of the parsers on any text whatever: no raise, stable rendering, linear work.

Ten thousand seeded texts a parser, and a few of hypothesis, which finds a short one where something breaks.
"""

import importlib
import pkgutil
import random
import re
import sys
import time
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crab_edge import tasks
from crab_edge.results import Box, Event, Points, Unparsed
from crab_edge.tasks import MODEL_CONTEXT, MediaContext

TEXTS = 10_000
#: One task of each parser: data sets of one kind share theirs.
PARSERS = [task.name for task in {task.parse: task for task in reversed(tasks.all())}.values()]


@dataclass(frozen=True)
class Span:
    start_s: float
    end_s: float


# Pieces that answers are made of, so that random texts get past the first character.
PIECES = [
    *(
        "<event> </event> <range> </range> <visual_event> </visual_event> <audio_event> <audio> <visual> "
        "</audio> <obj> </obj> <answer> </answer> ( ) [ ] , . - 0 3 7 10 224 1000 2.5 two seconds to and a "
        "dog </s> </S> (2 7) (3,4) 0,8 [1,2,30,40] (1,2)(3,4) [12.6,3,13.2,4] [5,6] [223.7,0] one first true "
        "false yes, no </ < > <|im_end|> İ K ſ video1 <obj>(1,2)(30,40)"
    ).split(),
    *("The sounding object is ", ". Its coordinates are ", "The object making the sound in the video is "),
    *(". Its bounding box is ", " and its points are ", " ", "  ", "\n", "\t", " is "),
]


def check(name, text, context):
    task = tasks.get(name)
    results = task.parse(text, context)
    assert isinstance(results, tuple) and results
    rendered = task.render(results, context)
    again = task.parse(rendered, context)
    assert task.render(again, context) == rendered
    for result in results:
        if isinstance(result, Event):
            assert result.label and 0 <= result.start_s < result.end_s <= context.end_s
        if isinstance(result, Box):
            assert 0 <= result.x1 < result.x2 <= context.width * (1 + 1e-9)
            assert 0 <= result.y1 < result.y2 <= context.height * (1 + 1e-9)
        if isinstance(result, Points):
            assert all(0 <= x < context.width and 0 <= y < context.height for x, y in result.xy)
        if isinstance(result, Unparsed):
            assert len(result.reason) < 250


def some_text(chance):
    count = chance.randrange(24)
    if chance.random() < 0.1:
        return "".join(
            chr(chance.choice((chance.randrange(32, 127), chance.randrange(0x3000)))) for _ in range(count)
        )
    return "".join(
        chance.choice(PIECES) if chance.random() < 0.9 else chr(chance.randrange(32, 0x250))
        for _ in range(count)
    )


def some_context(chance):
    window = None
    if chance.random() < 0.3:
        start = chance.uniform(0, 300)
        window = Span(start, start + 10.0)
    return MediaContext(chance.randint(1, 5000), chance.randint(1, 5000), chance.uniform(0.1, 400), window)


@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand_texts(name):
    chance = random.Random(f"texts for {name}")
    contexts = [MODEL_CONTEXT, *(some_context(chance) for _ in range(200))]
    for _ in range(TEXTS):
        text, context = some_text(chance), chance.choice(contexts)
        try:
            check(name, text, context)
        except Exception as error:
            raise AssertionError(f"{name} on {text!r} with {context}") from error


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join) | st.text(),
    context=st.builds(MediaContext, width=st.integers(1, 5000), duration_s=st.floats(0.1, 400)),
)
@example(text="<event>dog, (7.55 9)</event>", context=MediaContext(duration_s=7.6))
@example(text="<event>dog(1          2) (3 4)</event>", context=MediaContext())
@example(text="<answer></S>K</answer>", context=MediaContext())
@example(text="<answer>true</answer>[223.7,223.7]", context=MediaContext(width=3))
@example(text="The sounding object is x [12.6,3,13.2,4]", context=MediaContext(width=3))
@example(text="The sounding object is x [1,2,3,4] The sounding object is [1,2,3,4]", context=MediaContext())
def test_any_text_is_read_and_renders_stably(name, text, context):
    check(name, text, context)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["dog", "Male speech, man speaking", "Frying (food)", "St. Bernard"]),
            st.integers(0, 8),
            st.integers(1, 9),
        )
    )
)
def test_what_is_rendered_is_read_back(parts):
    events = [
        Event(label, float(start), float(min(10, start + length)), "audio-visual")
        for label, start, length in parts
    ]
    task = tasks.get("ave")
    read = [event for event in task.parse(task.render(events), MediaContext()) if isinstance(event, Event)]
    assert sorted(read, key=repr) == sorted(events, key=repr)


HOSTILE = (
    "(", "((", "<event>", "<event>a,(1 2)", "(1 ", "[1,2,", "1,", "12345678901234567890", " ", "</event",
    "<", "a ", "The sounding object is ", "<range>1", "<answer>", "is object making the sound in the ",
    "(1,2)", "two ", "-", "<obj>(1,2)", "[1,2]", "<answer>1 ", "video ", "its points are ",
)  # fmt: skip


def patterns():
    for module in pkgutil.iter_modules(tasks.__path__, "crab_edge.tasks."):
        if not module.ispkg:
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, re.Pattern):
                    yield f"{module.name}.{name}", value


@pytest.mark.parametrize(("name", "pattern"), patterns())
def test_patterns_repeat_nothing_without_bound(name, pattern):
    """A search with bounded repetition costs a bounded number of steps at each character."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern.pattern)
    assert not re.search(r"[*+]|\{[0-9]+,\}", bare), name


def steps(name, text):
    """Lines of Python that reading a text runs: regular expressions and string methods count as one."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        tasks.get(name).parse(text, MODEL_CONTEXT)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", PARSERS)
def test_steps_grow_no_faster_than_the_text(name):
    for piece in HOSTILE:
        short, long = steps(name, piece * 50), steps(name, piece * 200)
        assert long <= 4 * short + 100, piece


@pytest.mark.parametrize("name", PARSERS)
def test_long_texts_take_linear_time(name):
    for piece in HOSTILE:
        text = (piece * (100_000 // len(piece) + 1))[:100_000]
        started = time.process_time()
        tasks.get(name).parse(text, MODEL_CONTEXT)
        # Linear time is a fraction of a second; quadratic time would be minutes.
        assert time.process_time() - started < 10, piece

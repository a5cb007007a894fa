"""Every form of answer that the reference lists, and nonsense: events, boxes, questions, captions."""

from dataclasses import dataclass

import pytest

from crab_edge import tasks
from crab_edge.results import Box, Caption, Choice, Event, Unparsed
from crab_edge.tasks import MediaContext


@dataclass(frozen=True)
class Span:
    start_s: float
    end_s: float


def parse(name, text, **context):
    return tasks.get(name).parse(text, MediaContext(**context))


def both(label, start, end):
    return Event(label, start, end, "audio-visual")


SPEECH = "Male speech, man speaking"


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("Therefore, the events and time range are <event>dog, (2 7)</event>", [("dog", 2, 7)]),
        ("<event>people eating, (0 3)(7 10)</event>", [("people eating", 0, 3), ("people eating", 7, 10)]),
        ("<event>dog,(2,7)</event>, <event>cat, ( 3 , 4 )</event>.", [("dog", 2, 7), ("cat", 3, 4)]),
        (f"<event> {SPEECH} </event> from <range> 0,8 </range>", [(SPEECH, 0, 8)]),
        ("<event>Bark</event> <range>0 8</range>", [("Bark", 0, 8)]),
        ("<event>Bark</event> in <range>(0 3)(5 to 8)</range>", [("Bark", 0, 3), ("Bark", 5, 8)]),
        (f"<event>{SPEECH}, (1 4)</event>", [(SPEECH, 1, 4)]),
        ("<event>Frying (food), (0 10)</event>", [("Frying (food)", 0, 10)]),
        ("< EVENT >dog, [two - seven]</ event >", [("dog", 2, 7)]),
        ("<event>dog, (2s to 7 seconds)</event>", [("dog", 2, 7)]),
        ("<event>dog, (2.5–7)</event>", [("dog", 2.5, 7)]),
        ("<event>dog (1 2) and cat (3 4)", [("dog", 1, 2), ("cat", 3, 4)]),
        ("<event>dog, (1 2), and (3 4)</event>", [("dog", 1, 2), ("dog", 3, 4)]),
        ("<event>dog, (1\n 2)</event></s><event>cat, (1 2)</event>", [("dog", 1, 2)]),
        ("<event>dog, (0 99)</event>", [("dog", 0, 10)]),
    ],
)
def test_ave_forms(text, events):
    assert list(parse("ave", text)) == [both(*event) for event in events]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no <event> in ''"),
        ("There is a dog.", "no <event> in 'There is a dog.'"),
        ("<event>dog, (7 2)</event>", "dog: the range 7 to 2 s is reversed"),
        ("<event>dog, (7 7)</event>", "dog: the range 7 to 7 s is empty"),
        ("<event>dog, (-1 7)</event>", "dog: the range -1 to 7 s begins before the clip"),
        ("<event>dog, (10 12)</event>", "dog: the range 10 to 12 s begins after the clip's end at 10 s"),
        ("<event>dog</event>", "no time range for 'dog'"),
        ("<event>dog, (2 x)</event>", "no time range for 'dog, (2 x)'"),
        ("<event>(2 7)</event>", "a time range without an event in '(2 7)'"),
        ("<event></event>", "an empty <event>"),
        ("<range>0,8</range>", "a <range> without an <event>: '0,8'"),
        ("<event>dog</event><range>all along</range>", "a <range> without two numbers: 'all along'"),
        ("<event>dog</event><range>8,0</range>", "dog: the range 8 to 0 s is reversed"),
    ],
)
def test_ave_nonsense_keeps_its_reason(text, reason):
    assert parse("ave", text) == (Unparsed(reason),)


def test_unav_reads_as_ave_does():
    text = "Therefore, the events and time range are <event>people eating, (0 3)(7 10)</event>"
    assert parse("unav", text) == parse("ave", text) and len(parse("unav", text)) == 2


def test_a_bad_event_doesnt_spoil_the_others():
    found = parse("ave", "<event>dog, (7 2)(3 4)</event><event>cat</event><event>cow, (1 2)(x y)</event>")
    assert [result for result in found if isinstance(result, Event)] == [both("dog", 3, 4), both("cow", 1, 2)]
    assert [result.reason for result in found if isinstance(result, Unparsed)] == [
        "dog: the range 7 to 2 s is reversed",
        "no time range for 'cat'",
        "can't read the time range '(x y)'",
    ]


def test_seconds_belong_to_the_window_and_end_with_the_clip():
    text = "<event>dog, (2 10)</event>"
    assert parse("ave", text, duration_s=7.4) == (both("dog", 2, 7.4),)
    window = Span(20.0, 30.0)
    assert parse("ave", text, duration_s=65.0, window=window) == (both("dog", 22, 30),)
    assert parse("ave", text, duration_s=25.0, window=Span(20.0, 30.0)) == (both("dog", 22, 25),)
    context = MediaContext(duration_s=65.0, window=window)
    task = tasks.get("ave")
    assert task.render(task.parse(text, context), context).endswith("<event>dog, (2 10)</event>")


@pytest.mark.parametrize(
    "text",
    [
        "<visual_event>Dog,(0 5)(6 7)</visual_event><audio_event>Cat,(1 4)</audio_event>",
        "<visual> Dog, (0,5)(6,7) </visual> and <audio>Cat, (1,4)</audio>",
        "I see <Visual_Event>Dog,(zero five),(6 7)</Visual_Event>; I hear <audio_event>Cat (1 4)",
    ],
)
def test_avvp_forms(text):
    assert parse("avvp", text) == (
        Event("Dog", 0, 5, "visual"),
        Event("Dog", 6, 7, "visual"),
        Event("Cat", 1, 4, "audio"),
    )


def test_avvp_nonsense():
    assert parse("avvp", "a dog") == (Unparsed("no <visual_event> or <audio_event> in 'a dog'"),)
    assert parse("avvp", "<audio_event>Dog</audio_event><audio></audio>") == (
        Unparsed("no time range for 'Dog'"),
        Unparsed("an empty <audio>"),
    )


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The sounding object is dog. Its coordinates are <obj>(10,20)(112,224)</obj>.", "dog"),
        (
            "the sounding object is St. Bernard. Its coordinates are <obj>( 10, 20 ) ( 112 , 224 )",
            "St. Bernard",
        ),
        ("The object making the sound in the video is bus. [10,20,112,224]", "bus"),
        (f"The sounding object is {SPEECH}, and its coordinates are (10,20,112,224)", SPEECH),
        ("The sounding object is Frying (food), the bounding box is [10,20][112,224]", "Frying (food)"),
    ],
)
def test_arig_forms(text, label):
    assert parse("arig", text) == (Box(label, 10, 20, 112, 224),)
    assert parse("arig", text, width=1280, height=720) == (
        Box(label, 10 * 1280 / 224, 20 * 720 / 224, 640.0, 720.0),
    )


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("(112,20)(10,224)", "the box (112,20)(10,224) is reversed"),
        ("(10,20)(10,224)", "the box (10,20)(10,224) is empty"),
        ("(10,20)(112,225)", "the box (10,20)(112,225) leaves the 224x224 frame"),
        ("[-1,20,112,224]", "the box (-1,20)(112,224) leaves the 224x224 frame"),
        ("(1000,1000)(1000,1000)", "the box (1000,1000)(1000,1000) leaves the 224x224 frame"),
    ],
)
def test_arig_keeps_the_label_of_a_bad_box(box, reason):
    text = f"The sounding object is dog. Its coordinates are <obj>{box}</obj>."
    assert set(parse("arig", text)) == {Choice("dog"), Unparsed(reason)}


def test_arig_with_a_part_missing():
    assert parse("arig", "The sounding object is dog.") == (Choice("dog"), Unparsed("no box for 'dog'"))
    assert parse("arig", "[1,2,3,4]") == (Box("", 1, 2, 3, 4), Unparsed("the sounding object isn't named"))
    assert parse("arig", "woof") == (Unparsed("no sounding object and no box in 'woof'"),)


def test_arig_with_two_objects():
    text = (
        "The sounding object is dog. Its coordinates are <obj>(1,2)(3,4)</obj><obj>(5,6)(7,8)</obj>. "
        "The sounding object is cat. Its coordinates are <obj>(9,9)(10,10)</obj>."
    )
    assert parse("arig", text) == (
        Box("dog", 1, 2, 3, 4),
        Box("dog", 5, 6, 7, 8),
        Box("cat", 9, 9, 10, 10),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>yes</answer>", "yes"),
        ("I hear it. <answer> Saxophone. </answer>.", "saxophone"),
        ("<answer>no</answer> wait, <answer>yes</answer>", "yes"),
        ("so <answer>two", "two"),
        ("<answer>yes</answer><answer></answer>", "yes"),
        ("<answer>Yes, there is one.</answer>", "yes"),
        ("<answer>no; none</answer>", "no"),
    ],
)
def test_avqa_forms(text, value):
    assert parse("avqa", text) == (Choice(value),)


def test_avqa_nonsense():
    assert parse("avqa", "yes") == (Unparsed("no <answer> in 'yes'"),)
    assert isinstance(parse("avqa", "<answer> . </answer>")[0], Unparsed)


def test_caption():
    assert parse("avcap", " A dog\n barks.</s>x") == (Caption("A dog barks."),)
    assert parse("avcap", " \n") == (Unparsed("the answer is empty"),)


def test_rendering_gives_the_official_text():
    dog, cat = both("dog", 2, 7), both("cat", 0, 1)
    assert tasks.get("ave").render([dog]) == (
        "Therefore, the events and time range are <event>dog, (2 7)</event>"
    )
    assert tasks.get("ave").render([dog, cat, both("dog", 8, 9)]) == (
        "Therefore, the events and time range are <event>dog, (2 7)(8 9)</event>, <event>cat, (0 1)</event>"
    )
    events = [Event("dog", 1, 4, "audio"), Event("dog", 0, 5, "visual")]
    text = "<visual_event>dog,(0 5)</visual_event><audio_event>dog,(1 4)</audio_event>"
    assert tasks.get("avvp").render(events) == text
    assert tasks.get("avvp").render([both("dog", 2, 7)]) == (
        "<visual_event>dog,(2 7)</visual_event><audio_event>dog,(2 7)</audio_event>"
    )
    assert tasks.get("arig").render([Box("dog", 10.4, 20, 30.6, 40)]) == (
        "The sounding object is dog. Its coordinates are <obj>(10,20)(31,40)</obj>."
    )
    assert tasks.get("avqa").render([Choice("yes")]) == "<answer>yes</answer>"
    assert tasks.get("avcap").render([Caption("A dog.")]) == "A dog."


def test_rendering_never_makes_an_empty_range():
    text = tasks.get("ave").render([both("dog", 2.6, 2.9), both("cat", 3.0, 3.0)])
    assert "<event>dog, (2 3)</event>, <event>cat, (3 4)</event>" in text

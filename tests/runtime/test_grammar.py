"""Answers held to their task's form: whatever the logits are, what comes out parses."""

import builtins
import dataclasses

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.bundle import Bundle, default_bundle
from crab_edge.clip import Window
from crab_edge.completion import Completer
from crab_edge.errors import DependencyError, EngineError, InputError, TaskError
from crab_edge.grammar import Grammars, for_window, window_seconds
from crab_edge.guide import FREE_TOKENS, guide
from crab_edge.results import Box, Choice, Event, Unparsed
from crab_edge.session import Model
from crab_edge.tasks import MODEL_CONTEXT, MediaContext
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

TAGGED = [task for task in tasks.all() if task.grammar.strip()]
BY_NAME = {"argvalues": TAGGED, "ids": lambda task: task.name}
AVE = "Therefore, the events and time range are <event>dog, (2 7)</event>"
WIDE = MediaContext(duration_s=100, window=Window(30.0, 54.2))
SHORT = MediaContext(width=640, height=480, duration_s=22.4, window=Window(20.0, 30.0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake"))


@pytest.fixture(scope="module")
def grammars(bundle):
    return Grammars(bundle)


@pytest.fixture(scope="module")
def packaged():
    return Grammars(Bundle.open(default_bundle()))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media.video(tmp_path_factory.mktemp("clip") / "av.mp4", seconds=3, fps=4)


def say(grammars, task, logits, context=MODEL_CONTEXT, limit=512):
    """The text of one answer; `logits(n, text)` are those of its n-th token. None when it was cut off."""
    steered, ids = guide(grammars, task, context, limit), []
    eos = grammars.vocabulary.eos_ids
    while len(ids) < limit:
        text = b"".join(map(grammars.vocabulary.bytes_of, ids)).decode("utf-8", "replace")
        token = steered.choose(logits(len(ids), text), limit - len(ids))
        if token in eos:
            return text
        ids.append(token)
        if steered.finished:
            break
    return b"".join(map(grammars.vocabulary.bytes_of, ids)).decode("utf-8", "replace")


def unreadable(task, text, context=MODEL_CONTEXT):
    return [result for result in task.parse(text, context) if isinstance(result, Unparsed)]


def noise(grammars, seed, eager=0.0):
    """Random logits; `eager` lifts brackets, digits and tags, so that the right kind of nonsense comes."""
    random = np.random.default_rng(seed)
    lift = np.zeros(grammars.vocabulary.size, np.float32)
    for token in range(len(lift)):
        if any(char in grammars.vocabulary.bytes_of(token) for char in b"<>()[],0123456789/"):
            lift[token] = eager
    return lambda *_: random.standard_normal(len(lift), np.float32) + lift


def said_by(bundle, answer):
    """Logits of a model that says `answer` token by token and then ends."""
    ids = [*bundle.prompt.encode(answer), bundle.manifest.model.eos_ids[0]]

    def logits(n, _):
        out = np.zeros(bundle.manifest.model.vocab_size, np.float32)
        out[ids[min(n, len(ids) - 1)]] = 1
        return out

    return logits


@pytest.mark.parametrize("task", **BY_NAME)
def test_random_logits_never_give_an_unreadable_answer(grammars, task):
    for seed in range(4):
        context = SHORT if seed % 2 else MODEL_CONTEXT
        text = say(grammars, task, noise(grammars, seed, eager=seed % 4), context)
        assert task.parse(text, context) and not unreadable(task, text, context), text


@pytest.mark.parametrize("task", **BY_NAME)
def test_the_packaged_vocabulary_too(packaged, task):
    text = say(
        packaged, task, noise(packaged, 5, eager=1.0), SHORT, limit=packaged.form(task, SHORT).tokens + 40
    )
    assert task.parse(text, SHORT) and not unreadable(task, text, SHORT), text


@pytest.mark.parametrize("task", **BY_NAME)
def test_a_short_limit_still_gives_a_whole_answer(grammars, task):
    form = grammars.form(task)
    for limit in (form.tokens + 1, form.tokens + 25):
        text = say(grammars, task, noise(grammars, limit, eager=1.0), limit=limit)
        assert not unreadable(task, text), text
    few = max(1, form.tokens // 2)
    with pytest.raises(InputError, match=f"task {task.name} takes {form.tokens} tokens, but only {few}"):
        guide(grammars, task, MODEL_CONTEXT, few)
    with pytest.raises(InputError, match=f"task {task.name} needs .* --max-tokens"):  # the cache is fuller
        guide(grammars, task, MODEL_CONTEXT, 512).choose(noise(grammars, 0)(), few)


@pytest.mark.parametrize("task", **BY_NAME)
def test_an_opening_opens_every_sentence(grammars, task):
    shortest = grammars.form(task).shortest.decode()
    assert not task.opens or shortest.startswith(task.opens)
    starts = np.flatnonzero(grammars.vocabulary.allowed(grammars.form(task).matcher()))
    firsts = {grammars.vocabulary.bytes_of(int(token)).decode()[:1] for token in starts}
    assert not task.opens or firsts <= {opening[0] for opening in task.opens}


@pytest.mark.parametrize(
    "text", [AVE, "A dog barks. <event>dog, (0 1)(3 9)</event>", "Well: <event>a, b, (1 2)(4 9)</event>"]
)
def test_what_fits_the_form_comes_out_as_it_was(bundle, grammars, text):
    assert say(grammars, tasks.get("ave"), said_by(bundle, text)) == text


ODD = {
    "ave": [
        "dogs <EVENT>",
        "<range>0,8</range> it is",
        "<event>Dog (9 2)</event>",
        "</s>",
        "é<ev",
        "a" * 2000,
    ],
    "avvp": ["<visual>", "< audio_event >dog", "<visual_event>,(1 2)", ""],
    "arig": [
        "(1,2)(3,4)",
        "The sounding object is 7 (5,5)(1,1)",
        "the object making sounds is dog",
        "The sou",
    ],
    "avqa": ["<answer></answer>", "<answer>", "yes", "<Answer>no</answer>"],
}


@pytest.mark.parametrize(("name", "said"), [(name, said) for name in ODD for said in ODD[name]])
def test_odd_reasoning_ends_in_a_readable_answer(bundle, grammars, name, said):
    task = tasks.get(name)
    text = say(grammars, task, said_by(bundle, said))
    assert not unreadable(task, text), text
    common = next(
        (n for n, (a, b) in enumerate(zip(text, said, strict=False)) if a != b), min(len(text), len(said))
    )
    assert common >= min(len(said), 3), "the reasoning is the model's own up to there"


def test_free_text_is_bounded(bundle, grammars):
    text = say(grammars, tasks.get("avqa"), said_by(bundle, "a " * 1500))
    before = text.split("<answer>")[0]
    assert "</answer>" in text and 100 < len(before) and len(bundle.prompt.encode(before)) <= FREE_TOKENS


def test_events_start_inside_the_window(grammars):
    assert window_seconds(MODEL_CONTEXT) == (10, 10) and window_seconds(SHORT) == (3, 10)
    assert window_seconds(MediaContext(duration_s=0.2)) == (1, 10)
    assert window_seconds(WIDE) == (24, 24)
    for seconds in (10.0078, 7 * 1.1 + 10 - 7 * 1.1, 10.9):
        assert window_seconds(MediaContext(duration_s=seconds)) == (10, 10)
    assert window_seconds(MediaContext(duration_s=3600)) == (60, 60)

    def late(n, text):
        logits = np.zeros(grammars.vocabulary.size, np.float32)
        logits[grammars.vocabulary.ids(b"9")] = 1
        return logits

    events = tasks.get("ave").parse(say(grammars, tasks.get("ave"), late, SHORT), SHORT)
    assert all(isinstance(event, Event) and 20 <= event.start_s < event.end_s <= 22.4 for event in events)


def test_boxes_keep_their_corners_in_order(bundle, grammars):
    said = "The sounding object is dog. Its coordinates are <obj>(150,10)(120,5)</obj>."
    text = say(grammars, tasks.get("arig"), said_by(bundle, said))
    (box,) = tasks.get("arig").parse(text, MODEL_CONTEXT)
    assert isinstance(box, Box) and (box.x1, box.y1) == (150, 10) and box.x2 > 150 and box.y2 > 10
    assert text.startswith("The sounding object is dog. Its coordinates are <obj>(150,10)(")


def test_a_caption_is_never_empty(bundle, grammars):
    task = tasks.get("avcap")
    assert not unreadable(task, say(grammars, task, noise(grammars, 1), limit=6))
    special = np.zeros(grammars.vocabulary.size, np.float32)
    special[[bundle.prompt.special.im_start, *grammars.vocabulary.eos_ids]] = (
        2,
        *[1] * len(grammars.vocabulary.eos_ids),
    )
    assert not unreadable(task, say(grammars, task, lambda *_: special, limit=3))
    assert say(grammars, task, said_by(bundle, "a dog")) == "a dog"


def test_only_the_rule_span_is_fitted():
    lark = 'start: "<a>" span "b"\nspan: "(0 " "1)"\n    | "(9 " "10)"\nNAME: /span: x/\n'
    narrow, wide = for_window(lark, 2), for_window(lark, 25, 25)
    assert for_window(lark, 10) == lark and '"(1 " ("2)" |' in narrow and '"(2 ' not in narrow
    assert narrow.startswith('start: "<a>" span "b"\nspan: "(0 "') and narrow.endswith("\nNAME: /span: x/\n")
    assert '"(24 " ("25)")' in wide and "spans" not in wide
    assert for_window('start: "x"\n', 2) == 'start: "x"\n'
    assert "spans: span{1,12}\n" in for_window(tasks.get("ave").grammar, 25, 25)


def test_repeated_parts_are_told_apart():
    point = 'point: "[" NUMBER "," NUMBER "]"\nNUMBER: /[0-9]{1,2}/\n'
    for lark, text in (
        (f'start: point "," point "," point "."\n{point}', b"[0,0],[0,0],[0,0]."),
        (f'start: "a" NAME ("," DIGIT){{6}}\nNAME: /[a-z]+/\nDIGIT: /[0-9]/\n{point}', b"az,0,0,0,0,0,0"),
    ):
        assert Completer(lark).after(b"") == text


def test_a_completion_goes_on_where_the_text_stands():
    completer = Completer(tasks.get("arig").grammar)
    begun = b"The sounding object is big dog. Its coordinates are <obj>(150,"
    assert completer.after(begun) == b"0)(151,1)</obj>."
    assert completer.after(begun + b"0)(151,1)</obj>.") == b""
    with pytest.raises(EngineError, match="doesn't allow 'A dog'"):
        completer.after(b"A dog")
    with pytest.raises(EngineError, match="bound its repetitions"):
        Completer('start: "a" start').after(b"")


@pytest.mark.parametrize("name", ["ave", "arig", "meld"])
def test_one_token_is_judged_as_by_the_whole_mask(grammars, name):
    """Where the bytes are certain the mask holds the longest tokens only; shorter ones say the same."""
    form, vocabulary = grammars.form(tasks.get(name)), grammars.vocabulary
    matcher = form.matcher()
    for token in vocabulary.ids(form.shortest):
        allowed = vocabulary.allowed(matcher)
        judged = np.array([vocabulary.allows(matcher, i) for i in range(vocabulary.size)])
        assert not np.any(allowed & ~judged)
        certain = matcher.compute_ff_bytes()
        assert all(certain.startswith(vocabulary.bytes_of(i)) for i in np.flatnonzero(judged & ~allowed))
        assert matcher.consume_token(token)
    assert all(vocabulary.allows(matcher, token) for token in vocabulary.eos_ids)


def test_wrong_declarations_are_named(grammars):
    broken = dataclasses.replace(tasks.get("ave"), grammar="start: (")
    with pytest.raises(TaskError, match="task ave: llguidance refuses the grammar"):
        grammars.form(broken)
    other = dataclasses.replace(tasks.get("ave"), grammar='start: "<event>nothing</event>"')
    with pytest.raises(TaskError, match="task ave: its grammar allows '<event>nothing</event>'"):
        guide(grammars, other, MODEL_CONTEXT, 100)


def test_bytes_are_the_tokenizers(bundle, grammars):
    for token in range(bundle.prompt.vocab_size):
        if bundle.prompt.decode([token]) == "\ufffd" and not grammars.vocabulary.bytes_of(token):
            continue  # the byte 255, which no text has; llguidance marks special tokens with it
        assert grammars.vocabulary.bytes_of(token).decode("utf-8", "replace") == bundle.prompt.decode([token])


class Noisy(FakeEngine):
    """Random logits of its own after every token."""

    def forward(self, embeds, position_ids):
        super().forward(embeds, position_ids)
        return np.random.default_rng(self.length).standard_normal(self._model.vocab_size, np.float32)


def test_sessions_hold_answers_to_their_form(bundle, clip):
    session = Model(bundle, Noisy(bundle)).open(clip)
    answers = session.ask()
    assert {answer.task for answer in answers} >= {"ave", "avvp", "avcap"}
    for answer in [*answers, session.ask("Is there a dog?")]:
        assert answer.parsed and not any(isinstance(r, Unparsed) for r in answer.parsed), answer.raw
    assert any(
        isinstance(r, Unparsed) for r in session.ask(task="ave", max_new_tokens=20, grammar=False).parsed
    )


def test_a_model_may_be_told_not_to_hold_answers(bundle, clip):
    model = Model(bundle, FakeEngine(bundle, "yes"))
    model.grammar = False
    assert model.open(clip).ask("Is there a dog?").raw == "yes"
    assert model.open(clip).ask("Is there a dog?", grammar=True).raw.startswith("yes<answer>")


def test_a_limit_that_no_answer_fits_is_refused_before_anything_is_read(bundle, clip):
    engine = FakeEngine(bundle, AVE)
    session = Model(bundle, engine).open(clip)
    for ask in (
        lambda: session.stream(task="ave", max_new_tokens=5),
        lambda: session.ask_all(["avcap", "ave"], max_new_tokens=5),
    ):
        with pytest.raises(InputError, match="task ave takes"):
            ask()
    assert engine.forwards == []


def test_streams_and_prefixes_work_as_without(bundle, clip):
    model = Model(bundle, FakeEngine(bundle, "yes"))
    stream = model.open(clip).stream("Is there a dog?")
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == stream.answer.raw
    (choice,) = stream.answer.parsed
    assert isinstance(choice, Choice) and stream.answer.raw.startswith("yes<answer>")
    again = model.open(clip).ask("Is there a dog?", grammar=False)
    assert again.raw == "yes" and again.timings.cached_tokens > 0, "the next question shares the prefix"


def test_a_limit_that_shortens_is_noticed(bundle, clip):
    session = Model(bundle, Noisy(bundle)).open(clip)
    answer = session.ask(task="ave", max_new_tokens=40)
    assert not any(isinstance(r, Unparsed) for r in answer.parsed)
    assert any("cut off after 40 tokens" in notice for notice in answer.notices) or answer.timings.tokens < 40


def test_a_missing_package_is_named(bundle, clip, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "llguidance":
            raise ModuleNotFoundError("No module named 'llguidance'", name="llguidance")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    session = Model(bundle, FakeEngine(bundle, AVE)).open(clip)
    with pytest.raises(DependencyError, match=r"pip install llguidance.* --no-grammar"):
        session.ask(task="ave")
    assert session.ask(task="ave", grammar=False).raw == AVE


@pytest.mark.parametrize(
    ("name", "said", "kept"),
    [
        ("ave", "<event>dog, (0 2)</event>.", "<event>dog, (0 2)</event>."),
        ("ave", "<event>dog, (0 2)</event>! So", "<event>dog, (0 2)</event>"),
        ("ave", "<event>dog, (0 2)</event>\n<event>cat, (1 2)</event>", None),
        ("ave", "<event>dog, (0,2)</event>", "<event>dog, (0 2)</event>"),
        ("avvp", "<audio_event>dog,(0 2)</audio_event> <visual_event>dog,(1 2)</visual_event>", None),
        ("avqa", "<answer>yes</answer>.", "<answer>yes</answer>"),
    ],
)
def test_marks_alone_are_no_reason_to_trust_it_less(bundle, grammars, name, said, kept):
    steered, ids, logits = guide(grammars, tasks.get(name), MODEL_CONTEXT, 512), [], said_by(bundle, said)
    while not steered.finished and (not ids or ids[-1] not in grammars.vocabulary.eos_ids):
        ids.append(steered.choose(logits(len(ids), ""), 512 - len(ids)))
    assert b"".join(map(grammars.vocabulary.bytes_of, ids)).decode() == (kept or said)
    assert steered.held == 0


def test_forgotten_brackets_dont_become_a_name(bundle, grammars):
    """The seconds that should stand in brackets are no part of the label."""
    text = say(grammars, tasks.get("ave"), said_by(bundle, "<event>duck,0 3 seconds</event>"))
    label = tasks.get("ave").parse(text, MODEL_CONTEXT)[0].label
    assert label.startswith("duck") and not any(char.isdigit() for char in label), text


@pytest.mark.parametrize(
    "said", ['"A dog" barks', " A dog barks", '"', "<answer>dog</answer>", "\n\n\n\n\n\n\n"]
)
def test_a_caption_may_begin_with_marks(bundle, grammars, said):
    text = say(grammars, tasks.get("avcap"), said_by(bundle, said))
    assert not unreadable(tasks.get("avcap"), text)
    assert "dog" not in said or said[0] == "<" or text == said

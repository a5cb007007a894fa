"""Whatever a task's grammar allows parses: random sentences, drawn byte by byte from llguidance's masks."""

import random

import llguidance
import pytest

from crab_edge import tasks
from crab_edge.grammar import for_window, window_seconds
from crab_edge.results import Unparsed
from crab_edge.tasks import MODEL_CONTEXT, MediaContext
from crab_edge.tasks import grammars as build

SENTENCES = 20
GRAMMARS = {task.grammar: task for task in reversed(tasks.all()) if task.grammar}


@pytest.fixture(scope="module")
def tokenizer():
    return llguidance.LLTokenizer("byte")


def matcher(tokenizer, grammar):
    found = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not found.is_error(), found.get_error()
    return found


def sentence(tokenizer, grammar, chance):
    """One sentence; marks that end a name are preferred, or names would nearly always be of full length."""
    match, text = matcher(tokenizer, grammar), bytearray()
    while not match.is_stopped():
        mask = int.from_bytes(match.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if match.is_accepting() and (not allowed or chance.random() < 0.2):
            break
        marks = [byte for byte in allowed if chr(byte) in "<.([,"]
        byte = chance.choice(marks if marks and chance.random() < 0.3 else allowed)
        assert match.consume_token(byte), match.get_error()
        text.append(byte)
        assert len(text) < 1500
    return text.decode("ascii")


@pytest.mark.parametrize("task", GRAMMARS.values(), ids=lambda task: task.name)
def test_any_sentence_parses(tokenizer, task):
    chance = random.Random(task.name)
    for _ in range(SENTENCES):
        text = sentence(tokenizer, task.grammar, chance)
        assert any(text.startswith(start) for start in task.opens), text
        parsed = task.parse(text, MODEL_CONTEXT)
        assert parsed and not any(isinstance(result, Unparsed) for result in parsed), (text, parsed)


@pytest.mark.parametrize("name", ["ave", "avvp"])
@pytest.mark.parametrize("seconds", [0.4, 2.0, 7.3, 11.5, 36.0])
def test_seconds_end_with_the_clip(tokenizer, name, seconds):
    task, context = tasks.get(name), MediaContext(duration_s=seconds)
    grammar = for_window(task.grammar, *window_seconds(context))
    assert grammar != task.grammar and build.spans() not in grammar
    chance = random.Random(seconds)
    for _ in range(5):
        parsed = task.parse(sentence(tokenizer, grammar, chance), context)
        assert not any(isinstance(result, Unparsed) for result in parsed), parsed


def test_the_whole_window_has_the_whole_grammar():
    task = tasks.get("ave")
    for context in (MODEL_CONTEXT, MediaContext(duration_s=9.3)):
        assert for_window(task.grammar, *window_seconds(context)) == task.grammar
    assert for_window(tasks.get("avcap").grammar, 1) == ""


OFFICIAL = {
    "ave": "<event>Male speech, man speaking, (0 3)(7 10)</event>, <event>Frying (food), (1 2)</event>",
    "avvp": "<visual_event>Frying_(food),(0 5)</visual_event><audio_event>Dog,(1 4)</audio_event>",
    "arig": "The sounding object is dog. Its coordinates are <obj>(0,9)(10,224)</obj>.",
    "avqa": "<answer>more than ten</answer>",
    "meld": "<answer>joy</answer>",
    "a2v": "<answer>2</answer>",
    "ref_avs": "<answer>false</answer> The object is absent.",
    "s4": (
        "The object making the sound in the video is dog. "
        "Its bounding box is [0,0,1,1] and its points are [0,0],[223,9],[100,99]."
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_answers_are_sentences(tokenizer, name):
    match = matcher(tokenizer, tasks.get(name).grammar)
    for place, byte in enumerate(OFFICIAL[name].encode()):
        assert match.consume_token(byte), OFFICIAL[name][:place]
    assert match.is_accepting()


@pytest.mark.parametrize("text", ["(9,0)(9,5)", "(9,0)(3,5)", "(1,9)(3,9)", "(1,9)(3,224)"])
def test_boxes_of_the_grammar_have_an_extent(tokenizer, text):
    match = matcher(tokenizer, tasks.get("arig").grammar)
    start = "The sounding object is dog. Its coordinates are <obj>"
    taken = all(match.consume_token(byte) for byte in (start + text).encode())
    assert taken == (text == "(1,9)(3,224)")

"""Adding a task is one declaration: lists, prompt, runtime and parser take it from there."""

import json

import pytest

from crab_edge import avuie, tasks
from crab_edge.bundle import Bundle
from crab_edge.results import Choice, MaskFile, Unparsed
from crab_edge.session import Model
from crab_edge.tasks import MODEL_CONTEXT, Task, grammars
from crab_edge.tasks.qa import parse_answer, render_answer, truth_answer
from crab_edge.tasks.recipes import MediaRecipe
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle


@pytest.fixture
def weather():
    task = Task(
        name="weather",
        family="weather",
        media=MediaRecipe("2 images", images=2, frames=1),
        requires=frozenset({"image"}),
        instruction="What is the weather in {question}?",
        needs_question=True,
        question=lambda record: record["town"],
        parse=parse_answer,
        render=render_answer,
        truth=lambda record: (*truth_answer("weather")(record), MaskFile("sky", record["sky"])),
        form="<answer>rain|sun</answer>",
        grammar=grammars.answer("rain", "sun"),
        opens=("<answer>",),
        metric="accuracy",
        targets=("said",),
    )
    tasks.register(task)
    yield task
    tasks.unregister("weather")


def test_a_declaration_is_all_it_takes(tmp_path, weather):
    folder = tmp_path / "weather"
    folder.mkdir()
    still = media.picture(folder / "a.png", width=32, height=32)
    record = {
        "image1_path": "a.png",
        "image2_path": "b.png",
        "town": "Ghent",
        "weather": "Rain",
        "sky": "s.png",
    }
    record["said"] = "<answer>rain</answer>"
    media.picture(folder / "b.png", width=32, height=32)
    (folder / "test.json").write_text(json.dumps([record]))
    assert avuie.splits(tmp_path, weather) == [folder / "test.json"]
    split = avuie.read_split(folder / "test.json", weather)
    [found] = split.records
    assert found.question == "Ghent" and found.missing == [folder / "s.png"]
    assert found.truth == (Choice("rain"), MaskFile("sky", folder / "s.png"))
    assert avuie.target(record, weather) == "<answer>rain</answer>"

    bundle = Bundle.open(write_fake_bundle(tmp_path / "fake"))
    engine = FakeEngine(bundle, "<answer>sun</answer>")
    session = Model(bundle, engine).open(list(found.media))
    assert weather in session.applicable()
    answer = session.ask(found.question, task="weather", frame=found.frame)
    assert answer.parsed == (Choice("sun"),) and engine.vision_calls == [256, 256]
    assert weather.prompt(found.question) == "What is the weather in Ghent?"
    assert Model(bundle, engine).open(still).applicable() == []
    assert isinstance(weather.parse("rain", MODEL_CONTEXT)[0], Unparsed)

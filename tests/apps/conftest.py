"""The command line in this process, over a fake engine that answers what a test wants."""

import json

import pytest

from tests import media
from tests.apps import scripted
from tests.fake_bundle import FakeEngine, write_fake_bundle


class Ran:
    """One command line: exit code, standard output, standard error."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory):
    return write_fake_bundle(
        tmp_path_factory.mktemp("fake") / "bundle", question_templates=[r"Is there a \w+\?"]
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "av": media.video(folder / "av.mp4", seconds=8, fps=4),
        "mute": media.video(folder / "mute.mp4", seconds=3, fps=4, sound=False),
        "sound": media.sound(folder / "sound.wav", media.tone(3.0)),
        "still": media.picture(folder / "still.png", width=448, height=112),
    }


@pytest.fixture
def cli(fake_bundle, monkeypatch, capsys):
    """cli(arguments..., answers=...) -> Ran; `cli.engines` are the engines that were opened, of the class
    `cli.engine`."""
    from crab_edge_apps.cli import run

    from crab_edge import engines

    opened = []
    answers = [""]

    def create(name, bundle, *, threads=None):
        opened.append(call.engine(bundle, answers[0]))
        return opened[-1]

    monkeypatch.setattr(engines, "create", create)

    def call(*arguments, answers_=None):
        if answers_ is not None:
            answers[0] = answers_
        words = [str(argument) for argument in arguments]
        if words[0] in ("ask", "analyze") and "--bundle" not in words:
            words += ["--bundle", str(fake_bundle)]
        capsys.readouterr()
        code = run(words)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    call.engine = FakeEngine
    call.engines = opened
    return call


@pytest.fixture
def data(tmp_path):
    return scripted.lists_in(tmp_path)


@pytest.fixture
def model(monkeypatch):
    return scripted.install(monkeypatch, scripted.FakeModel(scripted.say_dog))

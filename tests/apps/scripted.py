"""A model that answers from a script, and test lists for it."""

import json
from pathlib import Path
from types import SimpleNamespace

import crab_edge
from crab_edge import tasks
from crab_edge.errors import MediaError
from crab_edge.results import Answer, Timings
from crab_edge.tasks import MediaContext


class FakeModel:
    """Answers with `say(clip's name, task, question)`; a clip called bad can't be opened."""

    def __init__(self, say, identity="fake/w4@0123"):
        self.say = say
        self.bundle = SimpleNamespace(identity=identity)
        self.asked = []
        self.opened = []
        self.duration_s = 10.0
        self.windows = 1

    def open(self, *media, kinds=None):
        assert {Path(path) for path in media} == set(kinds)
        self.opened.append([kinds[path] for path in media])
        name = Path(media[0]).stem
        if name == "bad":
            raise MediaError(f"{media[0]}: truncated")
        return SimpleNamespace(
            clip=SimpleNamespace(duration_s=self.duration_s, windows=lambda: [None] * self.windows),
            ask=lambda question, task, frame=None, grammar=True: self._ask(name, question, task),
        )

    def grammars(self):
        """None are needed: the script is the answer."""

    def _ask(self, name, question, task):
        self.asked.append((name, task, question))
        raw = self.say(name, task, question)
        parsed = tasks.get(task).parse(raw, MediaContext(duration_s=self.duration_s))
        return Answer(task, raw, parsed, Timings())


def ave(name, label="dog", **more):
    return {"event": label, "vid": name, "start_time": 0, "end_time": 10, **more}


def write_lists(data, lists):
    for place, records in lists.items():
        folder = data / place.split("/")[0]
        for kind in ("video", "audio", "image"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for record in records:
            name = record.get("vid", "x")
            for file in (f"video/{name}.mp4", f"audio/{name}.wav", f"image/{name}.png"):
                (folder / file).write_bytes(b"")
        (data / f"{place}.json").write_text(json.dumps(records))
    return data


def arig(name, label="dog"):
    media = {"visual_path": f"image/{name}.png", "audio_path": f"{name}.wav"}
    return {**media, "vid": name, "a_obj": label, "top_left": [0, 0], "bottom_right": [112, 112]}


def avqa(name, question, answer, kind):
    return {"video_id": name, "vid": name, "question": question, "answer": answer, "type": kind}


def say_dog(name, task, question):
    if task == "arig":
        return "The sounding object is dog. Its coordinates are <obj>(0,0)(112,100)</obj>."
    if task == "avqa":
        return "<answer>yes</answer>"
    return "<event>dog, (0 10)</event>"


def lists_in(folder):
    """Three tasks' lists below `folder`."""
    existential = '["Audio-Visual", "Existential"]'
    lists = {
        "ave/test": [
            ave("a", scene={"objects": 1, "silent": False}),
            ave("b", scene={"objects": 2, "silent": True}),
            ave("c", "cat", scene={"objects": 1, "silent": True}),
        ],
        "arig/test": [arig("a"), arig("b")],
        "arig/test_unseen": [arig("c"), arig("d", "cat")],
        "avqa/test": [
            avqa("a", "Is there a dog?", "yes", existential),
            avqa("a", "Is there a cat?", "no", existential),
            avqa("a", "How many?", "two", '["Audio", "Counting"]'),
        ],
    }
    return write_lists(folder / "AVUIE_2", lists)


def install(monkeypatch, *models):
    waiting = list(models)
    loaded = []

    def load(bundle=None, engine="auto"):
        loaded.append(bundle)
        return waiting[len(loaded) - 1] if len(loaded) <= len(waiting) else waiting[-1]

    monkeypatch.setattr(crab_edge, "load", load, raising=False)
    models[0].loaded = loaded
    return models[0]


def lines_of(report):
    return {(s.task, s.split, line.figure.name): line for s in report.scores for line in s.lines}

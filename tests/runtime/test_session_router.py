"""What a session gives a tracer to replay, and when: over a fake engine."""

import numpy as np
import pytest

from crab_edge.bundle import Bundle
from crab_edge.errors import EngineError, InputError
from crab_edge.session import Model
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

AVE = "Therefore, the events and time range are <event>dog, (2 7)</event>"
ADAPTER = {"rank": 32, "experts": 3, "alpha": 64, "adapted_linears": 1}


class FakeTracer:
    """Weights that count the tokens of each pass; notes what it was given."""

    layers = ("layers.0.mlp.up_proj",)

    def __init__(self):
        self.passes = []
        self.closed = False
        self.broken = False

    def __call__(self, embeds, position_ids):
        assert not self.closed
        if self.broken:
            raise EngineError("the decoder graph failed")
        self.passes.append((embeds.copy(), position_ids.copy()))
        weights = np.zeros((1, len(embeds), 3), np.float32)
        weights[..., 0] = np.arange(len(embeds))
        return weights

    def close(self):
        self.closed = True


class TracingEngine(FakeEngine):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tracers = []
        self.break_tracers = False

    def tracer(self):
        self.tracers.append(FakeTracer())
        self.tracers[-1].broken = self.break_tracers
        return self.tracers[-1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake", adapter=ADAPTER))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "av": media.video(folder / "av.mp4", seconds=8, fps=4),
        "long": media.video(folder / "long.mp4", seconds=23, fps=2),
        "still": media.picture(folder / "still.png"),
        "sound": media.sound(folder / "sound.wav", media.tone(3.0)),
    }


@pytest.fixture
def opened(bundle, clips):
    def make(answers, *names):
        engine = TracingEngine(bundle, answers)
        return Model(bundle, engine).open(*(clips[name] for name in names)), engine

    return make


def test_the_replay_is_what_the_engine_was_given(opened):
    session, engine = opened(AVE, "av")
    answer = session.ask(task="ave", router=True)
    (tracer,) = engine.tracers
    ((embeds, positions),) = tracer.passes
    given = np.concatenate([part for _, part, _ in engine.forwards])
    steps = np.concatenate([part for _, _, part in engine.forwards], axis=1)
    np.testing.assert_array_equal(embeds, given)
    np.testing.assert_array_equal(positions, steps)
    assert tracer.closed and answer.raw == AVE
    assert len(answer.router.tokens) == answer.timings.prompt_tokens + answer.timings.tokens


def test_a_cached_prefix_is_replayed_whole(opened):
    session, engine = opened(["one", "two"], "av")
    session.ask(task="avcap")
    first = np.concatenate([part for _, part, _ in engine.forwards[:1]])
    answer = session.ask(task="ave", router=True)
    ((embeds, _),) = engine.tracers[0].passes
    assert answer.timings.cached_tokens == len(first)
    np.testing.assert_array_equal(embeds[: len(first)], first)
    assert len(engine.vision_calls) == 1, "the media aren't encoded again"


def test_tokens_and_modalities(opened, bundle):
    session, _ = opened("a dög", "still", "sound")
    trace = session.ask(task="arig", router=True, grammar=False).router
    runs = [trace.modality[0]]
    for name in trace.modality[1:]:
        if name != runs[-1]:
            runs.append(name)
    assert runs == ["text", "image", "text", "audio", "text", "answer"]
    by_name = {
        kind: [text for text, name in zip(trace.tokens, trace.modality, strict=True) if name == kind]
        for kind in set(runs)
    }
    assert set(by_name["image"]) == set(by_name["audio"]) == {""}
    assert "".join(by_name["answer"]) == "a dög"
    text = "".join(by_name["text"])
    assert text.startswith(
        "<|im_start|>system\nYou see and hear.<|im_end|>\n<|im_start|>user\nThis is an image"
    )
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "<|vision_bos|><|vision_eos|>" in text


def test_windows_follow_each_other(opened):
    session, engine = opened(AVE, "long")
    answer = session.ask(task="ave", router=True)
    (tracer,) = engine.tracers
    lengths = [len(embeds) for embeds, _ in tracer.passes]
    assert len(lengths) == 3 and answer.router.windows == (0, lengths[0], lengths[0] + lengths[1])
    assert len(answer.router.tokens) == sum(lengths)
    np.testing.assert_array_equal(
        answer.router.weights[0, :, 0], np.concatenate([np.arange(length) for length in lengths])
    )


def test_several_tasks_share_a_tracer(opened):
    session, engine = opened(AVE, "av")
    answers = session.ask_all(["ave", "avcap"], router=True)
    assert len(engine.tracers) == 1 and engine.tracers[0].closed
    assert all(answer.router is not None for answer in answers)
    assert "router" in answers[0].to_json() and answers[0].to_json()["router"]["layers"] == 1


def test_without_asking_nothing_is_traced(opened):
    session, engine = opened(AVE, "av")
    answer = session.ask(task="ave")
    assert answer.router is None and "router" not in answer.to_json() and engine.tracers == []


def test_the_stream_comes_before_the_trace(opened):
    session, engine = opened("dog", "av")
    stream = session.stream(task="avcap", router=True)
    assert next(stream)
    assert engine.tracers[0].passes == []
    assert stream.answer.router is not None


def test_a_stopped_answer_has_no_trace(opened):
    session, engine = opened(AVE, "av")
    stopped = session.ask(task="ave", router=True, cancelled=lambda: len(engine.forwards) > 6)
    assert stopped.router is None and "stopped before the answer's end" in stopped.notices
    stream = session.stream(task="ave", router=True)
    next(stream)
    stream.close()
    assert stream.answer.router is None
    assert [tracer.closed for tracer in engine.tracers] == [True, True]
    assert all(tracer.passes == [] for tracer in engine.tracers)


def test_a_failing_pass_is_an_error_and_frees_the_model(opened):
    session, engine = opened("x", "av")
    engine.break_tracers = True
    with pytest.raises(EngineError, match="graph failed"):
        session.ask(task="avcap", router=True)
    assert engine.tracers[0].closed
    assert session.ask(task="avcap").raw == "x"


def test_what_cannot_be_traced_is_refused_at_once(bundle, clips, tmp_path):
    bare = Bundle.open(write_fake_bundle(tmp_path / "bare"))
    engine = TracingEngine(bare, "x")
    with pytest.raises(InputError, match="fake has no I-LoRA adapter, so there is no router to trace"):
        Model(bare, engine).open(clips["av"]).stream(task="avcap", router=True)
    with pytest.raises(InputError, match="engine fake can't trace routers"):
        Model(bundle, FakeEngine(bundle, "x")).open(clips["av"]).stream(task="avcap", router=True)
    assert engine.forwards == []

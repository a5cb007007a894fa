"""Sessions over a fake engine: what is decoded, prefilled, shared, streamed and said about it."""

import threading

import numpy as np
import pytest

from crab_edge.bundle import Bundle
from crab_edge.errors import CrabError, EngineError, InputError, TaskError
from crab_edge.results import Box, Caption, Choice, Event
from crab_edge.session import Model, Session, load
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

AVE = "Therefore, the events and time range are <event>dog, (2 7)</event>"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    templates = [r"Is there a \w+\?"]
    return Bundle.open(
        write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake", question_templates=templates)
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Small real media: `av` is 8 s with sound, `long` 23 s, `hollow` has an empty sound track."""
    folder = tmp_path_factory.mktemp("clips")
    tone = media.tone(3.0)
    return {
        "av": media.video(folder / "av.mp4", seconds=8, fps=4),
        "mute": media.video(folder / "mute.mp4", seconds=3, fps=4, sound=False),
        "long": media.video(folder / "long.mp4", seconds=23, fps=2),
        "short_sound": media.video(folder / "short_sound.mp4", seconds=23, fps=2, sound=tone),
        "sound": media.sound(folder / "sound.wav", tone),
        "still": media.picture(folder / "still.png", width=448, height=112),
        "hollow": media.video(folder / "hollow.mkv", seconds=3, fps=4, sound=False, empty_sound=True),
    }


@pytest.fixture
def opened(bundle, clips):
    """opened(answers, clip name, ...) -> (session, engine)"""

    def make(answers, *names):
        engine = FakeEngine(bundle, answers)
        return Model(bundle, engine).open(*(clips[name] for name in names)), engine

    return make


def test_a_task_gives_typed_results(opened):
    session, engine = opened(AVE, "av")
    answer = session.ask(task="ave")
    assert answer.parsed == (Event("dog", 2.0, 7.0, "audio-visual"),)
    assert answer.raw == AVE and answer.notices == () and answer.task == "ave"
    spent = answer.timings
    assert spent.tokens > 5 and spent.cached_tokens == 0
    assert spent.prompt_tokens == engine.length - spent.tokens
    assert engine.vision_calls == [5 * 256] and engine.audio_calls == [800]


def test_prompt_is_the_reference_layout(opened, bundle):
    session, engine = opened("", "av")
    session.ask(task="ave", grammar=False)
    special, prompt = bundle.prompt.special, bundle.prompt
    (_, prefix, positions), (_, suffix, after) = engine.forwards
    video = np.flatnonzero((prefix == 1001).all(axis=1))
    audio = np.flatnonzero((prefix == 2001).all(axis=1))
    assert len(video) == 320 and len(audio) == 200 and video[-1] < audio[0]
    lead = prompt.encode("user\nThis is a video and an audio:")
    np.testing.assert_array_equal(
        prefix[video[0] - 1 - len(lead) : video[0] - 1], bundle.embedding.rows(np.array(lead))
    )
    np.testing.assert_array_equal(
        prefix[video[0] - 1], bundle.embedding.rows(np.array([special.vision_bos]))[0]
    )
    ids = prompt.suffix("Please describe the events and time range that occurred in the video.")
    np.testing.assert_array_equal(suffix, bundle.embedding.rows(ids))
    assert positions[0, video].max() - positions[0, video].min() == 200
    assert after.min() == positions.max() + 1


def test_answer_positions_go_on_by_one(opened):
    session, engine = opened("dog", "av")
    session.ask(task="avcap")
    last = engine.forwards[1][2].max()
    steps = [positions for _, embeds, positions in engine.forwards[2:]]
    np.testing.assert_array_equal(
        np.concatenate(steps, axis=1), np.tile(np.arange(len(steps)), (3, 1)) + last + 1
    )


def test_questions_share_the_prefix(opened):
    session, engine = opened(["<answer>yes</answer>", "<answer>no</answer>", AVE], "av")
    first = session.ask("Is there a dog?")
    second = session.ask("Is there a cat?")
    third = session.ask(task="ave")
    assert first.parsed == (Choice("yes"),) and second.parsed == (Choice("no"),)
    assert third.parsed[0].label == "dog"
    assert len(engine.vision_calls) == len(engine.audio_calls) == 1
    starts = [length for length, embeds, _ in engine.forwards if len(embeds) > 1]
    assert len(starts) == 4 and starts[0] == 0 and len(set(starts[1:])) == 1
    assert second.timings.cached_tokens == third.timings.cached_tokens == starts[1]
    assert second.timings.encode_s == 0


def test_another_clip_takes_the_cache_and_gives_it_back(opened, clips):
    session, engine = opened("x", "av")
    other = session.model.open(clips["mute"])
    session.ask(task="avcap")
    other.ask(task="avcap")
    again = session.ask(task="avcap")
    assert again.timings.cached_tokens == 0
    assert len(engine.vision_calls) == 2, "encoder outputs of the first clip are kept"


def test_without_a_question_all_applicable_tasks_run(opened):
    session, _ = opened(AVE, "av")
    answers = session.ask()
    assert {"ave", "avvp", "avcap"} <= {answer.task for answer in answers}
    assert {answer.task for answer in answers} < {task.name for task in session.applicable()}


def test_missing_streams_change_the_lead(opened, bundle):
    for names, lead in ((("mute",), "This is a video:"), (("still",), "This is an image:")):
        session, engine = opened("a dog", *names)
        answer = session.ask("Is there a dog?")
        assert answer.task == "avqa" and not engine.audio_calls
        prefix = engine.forwards[0][1]
        rows = bundle.embedding.rows(np.array(bundle.prompt.encode(f"user\n{lead}")))
        place = int(np.flatnonzero((prefix > 999).all(axis=1))[0]) - 1
        np.testing.assert_array_equal(prefix[place - len(rows) : place], rows)


def test_still_and_sound_give_a_box_in_pixels(opened):
    session, engine = opened(
        "The sounding object is bus. Its coordinates are <obj>(0,0)(112,224)</obj>.", "still", "sound"
    )
    answer = session.ask(task="arig")
    assert answer.parsed == (Box("bus", 0, 0, 224, 112),)
    assert engine.vision_calls == [256] and engine.audio_calls == [300]


def test_empty_sound_track_is_noticed(opened):
    session, engine = opened("a dog", "hollow")
    assert "empty" in session.notices[0]
    assert "empty" in session.ask(task="avcap").notices[0]
    assert engine.audio_calls == []


def test_tasks_that_do_not_apply_name_those_that_do(opened):
    session, _ = opened("", "mute")
    with pytest.raises(TaskError, match=r"ave needs .*; tasks that apply: .*avcap"):
        session.ask(task="ave")
    with pytest.raises(TaskError, match="unknown task 'dance'"):
        session.ask(task="dance")
    with pytest.raises(TaskError, match="takes no question"):
        session.ask("Is there a dog?", task="avcap")
    with pytest.raises(TaskError, match="needs a question"):
        session.ask(task="avqa")
    with pytest.raises(TaskError):
        session.stream()


def test_two_sounds_for_one_place_are_not_guessed(opened):
    session, _ = opened("", "av", "sound")
    with pytest.raises(TaskError, match=r"1 audio stream, but 2 .*av\.mp4, sound\.wav.*--audio"):
        session.ask(task="avcap")
    assert [task.name for task in session.applicable()] == ["v2a"], "the video's own sound against the other"


def test_forced_kinds_choose_the_sound(bundle, clips):
    model = Model(bundle, FakeEngine(bundle, "x"))
    session = model.open(clips["av"], clips["sound"], kinds={clips["av"]: "video"})
    session.ask(task="avcap")
    assert model.engine.audio_calls == [300]


def test_long_clips_go_by_windows_in_clip_seconds(opened):
    first = "<event>dog, (2 10)</event>"
    second = "<event>dog, (0 4)</event>"
    third = "<event>cat, (0 10)</event>"
    session, engine = opened([first, second, third], "long")
    answer = session.ask(task="ave")
    assert answer.parsed == (
        Event("dog", 2.0, 14.0, "audio-visual"),
        Event("cat", 20.0, pytest.approx(23.0, abs=0.1), "audio-visual"),
    )
    assert answer.raw == f"{first}\n{second}\n{third}"
    assert engine.vision_calls == [5 * 256] * 3
    assert engine.audio_calls == [1000, 1000, pytest.approx(300, abs=10)]


def test_a_longer_window_shows_as_many_frames_a_second(bundle, clips):
    engine = FakeEngine(bundle, AVE)
    session = Model(bundle, engine).open(clips["long"], window_s=60)
    answer = session.ask(task="ave")
    assert answer.parsed == (Event("dog", 2.0, 7.0, "audio-visual"),)
    assert engine.vision_calls == [12 * 256]
    assert engine.audio_calls == [pytest.approx(2300, abs=10)]
    halves = Model(bundle, FakeEngine(bundle, AVE)).open(clips["long"], window_s=20)
    assert [event.start_s for event in halves.ask(task="ave").parsed] == [2.0, 22.0]


def test_the_frames_of_long_windows_are_decoded_in_portions(bundle, clips, monkeypatch):
    """As many seconds at a time as of short windows."""
    monkeypatch.setattr("crab_edge.session.AHEAD_S", 24.0)
    portions = []
    real = Session._prefetch
    monkeypatch.setattr(
        Session,
        "_prefetch",
        lambda self, plan, spent: portions.append([len(cut) for _, cut in plan]) or real(self, plan, spent),
    )
    for options in ({}, {"stride_s": 3, "window_s": 12}, {"window_s": 13}):
        Model(bundle, FakeEngine(bundle, "x")).open(clips["long"], **options).ask(task="avcap")
    assert portions == [[2], [1], [2], [2], [1], [1], [1]]


def test_a_short_clip_is_the_same_in_any_window(bundle, clips):
    engines = [FakeEngine(bundle, AVE) for _ in range(2)]
    for engine, window_s in zip(engines, (10, 60), strict=True):
        Model(bundle, engine).open(clips["av"], window_s=window_s).ask(task="ave")
    assert engines[0].vision_calls == engines[1].vision_calls == [5 * 256]


def test_windows_and_their_limits(bundle, clips):
    model = Model(bundle, FakeEngine(bundle, AVE))
    for wrong in (0, 5, 61, float("nan")):
        with pytest.raises(InputError, match="expected 10 s"):
            model.open(clips["long"], window_s=wrong)


def test_tasks_share_each_window(opened):
    session, engine = opened("a dog", "long")
    answers = session.ask_all(["avcap", "ave"])
    assert len(answers[0].parsed) == 3 and answers[0].parsed[0] == Caption("a dog", window=(0, 10))
    assert len(engine.vision_calls) == 3
    assert answers[1].timings.cached_tokens > 1000 and answers[1].timings.prefill_s < 5


def test_questions_about_long_clips_see_the_whole(opened):
    session, engine = opened("<answer>yes</answer>", "long")
    assert session.ask("Is there a dog?").parsed == (Choice("yes"),)
    assert engine.vision_calls == [5 * 256] and engine.audio_calls == [pytest.approx(2300, abs=10)]


def test_a_stream_that_ends_early_is_missing_from_later_windows(opened):
    session, engine = opened("a dog", "short_sound")
    answer = session.ask(task="avcap")
    assert len(answer.parsed) == 3
    assert len(engine.vision_calls) == 3 and len(engine.audio_calls) == 1


def test_streaming_gives_the_same_text(opened):
    session, _ = opened("a dög bärks ☂ twice", "av")
    stream = session.stream(task="avcap")
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == "a dög bärks ☂ twice"
    assert stream.answer.raw == "a dög bärks ☂ twice" and stream.answer.notices == ()


def test_reading_the_answer_reads_the_stream(opened):
    session, _ = opened("a dog", "av")
    assert session.stream(task="avcap").answer.raw == "a dog"


def test_closing_a_stream_keeps_what_was_said(opened):
    session, _ = opened("a dog and a cat and a bus and a horse", "av")
    stream = session.stream(task="avcap")
    said = next(stream) + next(stream)
    stream.close()
    assert stream.answer.raw == said.strip()
    assert "stopped" in stream.answer.notices[-1]
    assert session.ask(task="avcap").raw.endswith("horse"), "the model is free again"


def test_closing_before_the_start(opened):
    session, engine = opened("a dog", "av")
    stream = session.stream(task="avcap")
    stream.close()
    assert stream.answer.raw == "" and "stopped" in stream.answer.notices[-1]
    assert engine.forwards == []


def test_cancelling(opened):
    session, engine = opened("a dog and a cat", "long")
    polls = []
    answer = session.ask(task="avcap", cancelled=lambda: polls.append(1) or len(polls) > 4)
    assert "stopped" in answer.notices[-1] and len(engine.vision_calls) == 1
    assert "a dog and a cat".startswith(answer.raw)


@pytest.mark.parametrize(("chunks", "kept"), [(3, False), (6, True), (7, True)])
def test_cancelling_while_a_prompt_is_read(opened, monkeypatch, chunks, kept):
    """Six chunks are the prefix, the question is more than one; asked again, the rest is the same."""
    monkeypatch.setattr("crab_edge.generate.prefill_chunk", lambda width: 100)
    question = "Is there a dog? " * 60
    whole, undisturbed = opened("yes", "av")
    assert whole.ask(question, grammar=False).raw == "yes" and len(undisturbed.forwards[5][1]) < 100
    session, engine = opened("yes", "av")
    answer = session.ask(question, cancelled=lambda: len(engine.forwards) == chunks)
    assert answer.raw == "" and answer.parsed == () and "stopped" in answer.notices[-1]
    assert len(engine.forwards) == chunks and answer.timings.prefill_s > 0
    again = session.ask(question, grammar=False)
    assert again.raw == "yes" and bool(again.timings.cached_tokens) == kept
    rest = undisturbed.forwards[6 if kept else 0 :]
    for done, expected in zip(engine.forwards[chunks:], rest, strict=True):
        for one, other in zip(done, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_cancelling_between_encoders(opened):
    session, engine = opened("a dog", "av")
    answer = session.ask(task="avcap", cancelled=lambda: bool(engine.vision_calls))
    assert "stopped" in answer.notices[-1] and not engine.audio_calls and not engine.forwards
    assert session.ask(task="avcap").raw == "a dog" and len(engine.vision_calls) == 1


def test_cut_off_answers_say_so(opened):
    session, _ = opened("a dog and a cat and a bus", "av")
    answer = session.ask(task="avcap", max_new_tokens=4)
    assert answer.timings.tokens == 4 and "cut off after 4 tokens" in answer.notices[-1]


def test_unfamiliar_questions_get_a_notice(opened):
    session, _ = opened("<answer>yes</answer>", "av")
    assert session.ask("Is there a dog?").notices == ()
    assert "unfamiliar question" in session.ask("Who painted it?").notices[0]
    assert "unfamiliar question" in session.ask("Is there a dog? Really?").notices[0]
    assert session.ask(task="avcap", grammar=False).notices == ()


def test_long_prompts_are_prefilled_in_chunks(opened, monkeypatch):
    monkeypatch.setattr("crab_edge.generate.prefill_chunk", lambda width: 100)
    session, engine = opened("a dog", "av")
    session.ask(task="avcap")
    sizes = [len(embeds) for _, embeds, _ in engine.forwards]
    assert max(sizes) == 100 and sizes.count(100) >= 5
    ends = [length + len(embeds) for length, embeds, _ in engine.forwards]
    assert ends == sorted(ends) and [length for length, *_ in engine.forwards] == [0, *ends[:-1]]


def test_prompts_that_do_not_fit_are_refused(tmp_path, clips):
    bundle = Bundle.open(write_fake_bundle(tmp_path / "small", max_positions=400))
    session = Model(bundle, FakeEngine(bundle, "x")).open(clips["av"])
    with pytest.raises(InputError, match="holds 400"):
        session.ask(task="avcap")


def test_the_answer_ends_with_the_positions(tmp_path, clips):
    bundle = Bundle.open(write_fake_bundle(tmp_path / "small", max_positions=580))
    engine = FakeEngine(bundle, "dog " * 500)
    answer = Model(bundle, engine).open(clips["av"]).ask(task="avcap")
    assert engine.length == 580 and answer.timings.tokens == 580 - answer.timings.prompt_tokens + 1
    assert "cut off" in answer.notices[-1]


def test_broken_logits_are_an_error(opened):
    session, engine = opened("x", "av")
    engine.broken = True
    with pytest.raises(EngineError, match="finite"):
        session.ask(task="avcap")
    engine.broken = False
    assert session.ask(task="avcap").raw == "x"


def test_encoders_that_return_too_few_tokens(opened):
    session, engine = opened("x", "av")
    engine.audio = lambda chunks, lengths: np.zeros((3, 8), np.float32)
    with pytest.raises(EngineError, match="audio encoder returned 3 tokens, expected 200"):
        session.ask(task="avcap")


def test_one_stream_at_a_time(opened):
    session, _ = opened("a dog and a cat", "av")
    stream = session.stream(task="avcap")
    next(stream)
    with pytest.raises(CrabError, match="still being streamed"):
        session.ask(task="avcap")
    waiting = threading.Thread(target=session.ask, kwargs={"task": "avcap"})
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "another thread waits for its turn"
    assert stream.answer.raw == "a dog and a cat"
    waiting.join(10)
    assert not waiting.is_alive()


def test_load_takes_an_engine_and_refuses_unknown_names(bundle, clips):
    with pytest.raises(InputError, match=r"unknown engine 'warp'; choose one of: auto, .*onnxruntime"):
        load(bundle, "warp")
    with pytest.raises(InputError, match="threads"):
        load(bundle, threads=0)
    model = load(bundle.path, FakeEngine(bundle, "x"))
    session = model.open([str(clips["still"]), clips["sound"]])
    assert len(session.clip.images) == len(session.clip.audios) == 1
    assert model.open(session.clip).clip is session.clip


def test_a_model_that_names_its_tasks_runs_those_by_itself(tmp_path, clips):
    known = Bundle.open(write_fake_bundle(tmp_path / "known", tasks=["avcap", "ave"]))
    session = Model(known, FakeEngine(known, AVE)).open(clips["av"])
    assert {answer.task for answer in session.ask()} == {"avcap", "ave"}
    assert session.ask(task="ave").notices == ()
    assert "wasn't trained on avvp (but on avcap, ave)" in session.ask(task="avvp").notices[0]

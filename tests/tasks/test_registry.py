"""The registry, the recipes and what a new task needs."""

import dataclasses

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.errors import InputError, TaskError
from crab_edge.tasks import IMAGE_AUDIO, VIDEO_10, VIDEO_10_REWINDOW, MediaRecipe
from crab_edge.tasks.recipes import IMAGE_AUDIO_5TH, IMAGE_AUDIO_10TH, TWO_AUDIOS, TWO_VIDEOS, VIDEO_4

ACTION = "Please identify the action taking place in the video."
EMOTION = "Please judge the person's emotion at the moment."
SEGMENT = (
    "Please identify the category of the object producing the sound in the video frame. Then, provide the "
    "bounding box and three pixel points of the object that is making the sound within the frame."
)
OFFICIAL = {
    "a2v": "Please listen to the audio and indicate which of the two videos matches what you hear.",
    "v2a": "Please view the video and indicate which of the two audio clips matches what you see.",
    **dict.fromkeys(("ks", "ucf"), ACTION),
    **dict.fromkeys(("meld", "mer24", "cremad", "mafw", "dfew"), EMOTION),
    **dict.fromkeys(("s4", "ms3"), SEGMENT),
    "ref_avs": (
        "Please analyze the video frame and audio to find the object described as <des>{question}</des>. "
        'Answer with "true" or "false" whether the object exists. If it exists, respond with a sentence '
        "identifying the object's name, its bounding box, and three pixel points; if not, state that the "
        "object is absent."
    ),
    "avqa_thu": "Please answer the question based on the options: {question}",
    "unav": "Please describe the events and time range that occurred in the video.",
    "ave": "Please describe the events and time range that occurred in the video.",
    "avvp": (
        "Please determine the events that occur based on the visual and audio information in the video, "
        "as well as the start and end times of these events."
    ),
    "arig": "Please recognize the category of object that makes the sound and then output its bounding box.",
    "avqa": "Please answer this question: {question}",
    "avcap": "Please describe this video and audio.",
}


def test_official_instructions_are_verbatim():
    assert {task.name: task.instruction for task in tasks.all()} == OFFICIAL


def test_unknown_task_lists_the_names():
    with pytest.raises(TaskError, match="unknown task 'ava'; the tasks are a2v, arig, avcap, ave, avqa, "):
        tasks.get("ava")


FACES = {"meld", "mer24", "cremad", "mafw", "dfew"}


@pytest.mark.parametrize(
    ("streams", "names"),
    [
        ({"video", "audio"}, {"ave", "unav", "avvp", "avqa", "avqa_thu", "avcap", "ks", "ucf"} | FACES),
        ({"video"}, {"avvp", "avqa", "avqa_thu", "avcap", "ks", "ucf"} | FACES),
        ({"audio"}, {"avvp", "avqa", "avqa_thu", "avcap"} | FACES),
        ({"image", "audio"}, {"arig", "s4", "ms3", "ref_avs"}),
        ({"image"}, set()),
        (set(), set()),
    ],
)
def test_tasks_that_apply(streams, names):
    assert {task.name for task in tasks.applicable(streams)} == names


def test_tasks_that_compare_two_clips_need_two():
    pairs = {"a2v", "v2a"}
    assert not pairs & {task.name for task in tasks.applicable(["video", "audio"])}
    assert pairs & {task.name for task in tasks.applicable(["video", "video", "audio"])} == {"a2v"}
    assert pairs & {task.name for task in tasks.applicable(["video", "audio", "audio"])} == {"v2a"}
    with pytest.raises(TaskError, match="task a2v needs two videos and audio; the clip has video and audio"):
        tasks.get("a2v").recipe_for(["video", "audio"])
    with pytest.raises(TaskError, match="needs video and two audio clips; the clip has two videos and audio"):
        tasks.get("v2a").recipe_for(["video", "video", "audio"])


def test_tasks_that_ask_the_same_are_one_question():
    names = [task.name for task in tasks.distinct(tasks.all())]
    assert len(names) == len(tasks.all()) - 7
    assert not {"ucf", "unav", "ms3", "mer24", "cremad", "mafw", "dfew"} & set(names)


def test_every_task_is_whole():
    assert len(tasks.all()) == 19
    for task in tasks.all():
        assert task.form and task.targets and task.metric, task.name
        assert bool(task.grammar) == bool(task.opens) == (task.name != "avcap"), task.name
    families = {task.family for task in tasks.all()}
    assert len(families) == 8


def test_published_figures():
    published = {task.name: task.published[0].value for task in tasks.all() if task.published}
    assert published == {
        "ave": 83.58,
        "avqa_thu": 92.16,
        "ks": 91.12,
        "ucf": 94.04,
        "avqa": 79.44,
        "avvp": 59.47,
        "mafw": 45.6,
        "dfew": 64.34,
        "meld": 52.08,
    }


def test_unknown_stream_is_refused():
    with pytest.raises(TaskError, match="unknown stream 'smell'"):
        tasks.applicable({"smell"})


def test_recipes_for_a_clip():
    assert tasks.get("ave").recipe_for({"video", "audio"}) is VIDEO_10
    assert tasks.get("avqa").recipe_for({"video", "audio"}) is VIDEO_10_REWINDOW
    assert tasks.get("avqa").recipe_for({"image"}) is IMAGE_AUDIO
    assert tasks.get("avcap").recipe_for({"image", "audio"}) is IMAGE_AUDIO
    with pytest.raises(TaskError, match="task ave needs video and audio; the clip has video"):
        tasks.get("ave").recipe_for({"video"})
    with pytest.raises(TaskError, match="task arig needs image and audio; the clip has video and audio"):
        tasks.get("arig").recipe_for({"video", "audio"})
    with pytest.raises(TaskError, match="task avvp takes video and audio; the clip has image"):
        tasks.get("avvp").recipe_for({"image"})


def test_prompt_slots():
    assert tasks.get("ave").prompt() == OFFICIAL["ave"]
    assert tasks.get("avqa").prompt(" Is {this} a dog? ") == "Please answer this question: Is {this} a dog?"
    with pytest.raises(TaskError, match="task avqa needs a question"):
        tasks.get("avqa").prompt("  ")
    with pytest.raises(TaskError, match="task ave takes no question"):
        tasks.get("ave").prompt("Is there a dog?")
    assert "<des>the red guitar</des>" in tasks.get("ref_avs").prompt(" The red Guitar ")


def test_a_second_task_of_the_same_name_is_refused():
    other = dataclasses.replace(tasks.get("ave"), grammar="another")
    with pytest.raises(TaskError, match="two tasks called ave"):
        tasks.register(other)
    assert tasks.register(tasks.get("ave")) is tasks.get("ave")


@pytest.mark.parametrize(
    ("recipe", "visual", "audio", "lead"),
    [
        (VIDEO_10, True, True, "This is a video and an audio:"),
        (VIDEO_10, True, False, "This is a video:"),
        (VIDEO_10, False, True, "This is an audio:"),
        (IMAGE_AUDIO, True, True, "This is an image and an audio:"),
        (IMAGE_AUDIO, True, False, "This is an image:"),
        (TWO_VIDEOS, True, True, "These are two videos and an audio:"),
        (TWO_AUDIOS, True, True, "This is a video and two audio clips:"),
        (IMAGE_AUDIO_5TH, True, True, "This is an image and an audio:"),
    ],
)
def test_lead_sentences(recipe, visual, audio, lead):
    assert recipe.lead(visual, audio) == lead


def test_no_stream_no_lead():
    with pytest.raises(InputError, match="none of its streams"):
        VIDEO_10.lead(False, False)


def test_rewindow_keeps_short_audio():
    wave = np.arange(40 * 16_000 - 1, dtype=np.float32)
    assert VIDEO_10_REWINDOW.slice_audio(wave) is wave


def test_rewindow_takes_the_references_windows():
    unit = 16_000
    wave = np.arange(60 * unit, dtype=np.float32)
    out = VIDEO_10_REWINDOW.slice_audio(wave)
    assert out.shape == (20 * unit,) and out.dtype == np.float32
    assert not out[: unit // 2].any()
    np.testing.assert_array_equal(out[unit // 2 : 2 * unit], wave[: unit * 3 // 2])
    for index, start in enumerate(range(6, 60, 6), 1):
        first = start * unit - unit // 2
        window = out[index * 2 * unit : (index + 1) * 2 * unit]
        np.testing.assert_array_equal(window, wave[first : first + 2 * unit])


def test_rewindow_of_an_odd_length_stays_inside():
    wave = np.ones(40 * 16_000 + 61, dtype=np.float32)
    unit = len(wave) // 60
    out = VIDEO_10_REWINDOW.slice_audio(wave)
    assert len(out) == 20 * unit
    assert out[unit // 2 :].all()


def test_other_audio_rules():
    wave = np.ones(3 * 16_000, dtype=np.float32)
    first4 = VIDEO_4.slice_audio(wave)
    assert len(first4) == 64_000 and first4.sum() == 48_000
    unit5 = IMAGE_AUDIO_5TH
    np.testing.assert_array_equal(unit5.slice_audio(np.arange(11, dtype=np.float32), 4), [8, 9])
    assert (unit5.units, IMAGE_AUDIO_10TH.units, VIDEO_4.units) == (5, 10, 0)
    with pytest.raises(InputError, match=r"needs an index 0\.\.4, got None"):
        unit5.slice_audio(wave)
    with pytest.raises(InputError, match="unknown audio rule 'half'"):
        MediaRecipe("x", audios=1, audio="half").slice_audio(wave)
    with pytest.raises(InputError, match="mono"):
        VIDEO_10.slice_audio(np.zeros((2, 5), np.float32))

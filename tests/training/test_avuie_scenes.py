"""AV-UIE v2's train lists as scenes: pairs of clips, parts of a sound, the sound that the list names."""

import json

import numpy as np
import pytest

from crab_edge import tasks
from crab_edge.errors import InputError
from crab_edge.features import FeatureConfig
from crab_edge.prompt import PromptBuilder
from crab_edge.training.avuie import AvuieScenes
from crab_edge.training.data import Vocabulary, language_batch
from tests import media
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("AVUIE_2")
    lists = {
        "a2v": {"video1_path": "1.mp4", "video2_path": "2.mp4", "audio_path": "low.wav", "correct_video": 2},
        "v2a": {"video_path": "1.mp4", "audio1_path": "low.wav", "audio2_path": "high.wav"},
        "meld": {"video_path": "1.mp4", "audio_path": "low.wav", "Emotion": "joy"},
        "ms3": {"image_path": "frames/3.png", "audio_path": "steps.wav", "a_obj": "dog", "frame_idx": 3},
    }
    for name, record in lists.items():
        for folder in ("video", "audio", "frames"):
            (root / name / folder).mkdir(parents=True)
        record["label" if name != "ms3" else "label_content"] = "<answer>2</answer>"
        (root / name / "train.json").write_text(json.dumps([record]))
        media.video(root / name / "video/1.mp4", seconds=2, fps=4)
        media.video(root / name / "video/2.mp4", seconds=3, fps=4)
        media.sound(root / name / "audio/low.wav", media.tone(2.0, hertz=220.0))
        media.sound(root / name / "audio/high.wav", media.tone(3.0, hertz=880.0))
    media.picture(root / "ms3/frames/3.png", width=32, height=32)
    media.sound(root / "ms3/audio/steps.wav", (np.arange(5 * 16000) // 16000).astype(np.float32) / 10)
    return root


def scenes(root, name):
    return AvuieScenes([(tasks.get(name), root / name / "train.json")])


def test_pairs_are_joined(root):
    scene = scenes(root, "a2v").clip(0)
    assert scene.frames.shape == (20, 224, 224, 3) and scene.wave.shape == (32_000,)
    assert scene.samples[0].lead == "These are two videos and an audio:"
    scene = scenes(root, "v2a").clip(0)
    assert scene.frames.shape == (10, 224, 224, 3) and scene.wave.shape == (80_000,)


def test_parts_by_recipe(root):
    scene = scenes(root, "meld").clip(0)
    assert scene.frames.shape[0] == 4 and scene.wave.shape == (64_000,)
    scene = scenes(root, "ms3").still(0)
    assert scene.wave.shape == (16_000,) and scene.wave == pytest.approx(0.3, abs=1e-3)


def test_the_sound_stands_before_two_videos(root, tmp_path):
    builder = PromptBuilder(tiny_tokenizer(tmp_path / "t.json"), FeatureConfig(n_mels=80, system_prompt="x"))
    for name, sound_first in (("a2v", True), ("v2a", False)):
        scene = scenes(root, name).clip(0)
        batch = language_batch([(scene, scene.samples[0].lead, scene.samples)], builder, Vocabulary(("dog",)))
        ids = batch["ids"].flatten().tolist()
        order = ids.index(builder.special.audio) < ids.index(builder.special.video)
        assert order == sound_first
        assert ids.count(builder.special.video) == (640 if name == "a2v" else 320)


def test_missing_media_are_named(root, tmp_path):
    (tmp_path / "a2v").mkdir()
    (tmp_path / "a2v/train.json").write_text((root / "a2v/train.json").read_text())
    with pytest.raises(InputError, match="3 media files of the train lists are missing"):
        scenes(tmp_path, "a2v")

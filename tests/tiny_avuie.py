"""A folder in AV-UIE v2's layout with a few small records, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests import media

ANSWERS = ("The sounding object is dog. [12,30,200,210]", "The sounding object is bus. [1,2,30,40]")


def make_tiny_avuie(root: Path, *, stills: int = 5, clips: int = 0) -> Path:
    """`stills` records of s4 (a picture and 1 s of sound), `clips` of cremad (4 frames and 4 s of sound)."""
    tone = media.tone(1.0, hertz=330.0)
    for task, count in (("s4", stills), ("cremad", clips)):
        for folder in ("image", "video", "audio"):
            (root / task / folder).mkdir(parents=True, exist_ok=True)
        records = []
        for i in range(count):
            media.sound(root / task / f"audio/{i}.wav", np.tile(tone, 5) * (0.2 + 0.1 * i))
            record = {"audio_path": f"audio/{i}.wav"}
            if task == "s4":
                media.picture(root / task / f"image/{i}.png", width=24 + 8 * i, height=32)
                record |= {"image_path": f"image/{i}.png", "label_content": ANSWERS[i % 2]}
            else:
                media.video(root / task / f"video/{i}.mp4", seconds=2, fps=4)
                record |= {"video_path": f"video/{i}.mp4", "label": "<answer>joy</answer>"}
            records.append(record)
        if count:
            (root / task / "train.json").write_text(json.dumps(records))
    return root

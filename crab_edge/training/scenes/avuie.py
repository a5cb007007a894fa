"""Writes scenes in AV-UIE v2's layout: `<out>/<task>/{train,test,test_unseen}.json`, the media beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crab_edge.errors import TaskError
from crab_edge.training.scenes.extras import Extras
from crab_edge.training.scenes.media import write_mp4, write_wav
from crab_edge.training.scenes.records import write_task
from crab_edge.training.scenes.source import FPS, RenderedScene, SceneSource
from crab_edge.training.scenes.staged import TaskScenes
from crab_edge.training.scenes.truth import Sample

TASKS = ("ave", "avvp", "arig", "avqa", "avcap")
QUESTIONS_PER_SCENE = 3
_NAME_FIELD = {"ave": "vid", "avvp": "vid", "avqa": "video_id", "avcap": "video_id"}


def task_names() -> tuple[str, ...]:
    """Every task that has scenes, and "avqa-music": avqa's records about ensembles, in lists of their own."""
    return (*TASKS, *TaskScenes.tasks())


def write_avuie(
    source: SceneSource,
    out_dir: str | Path,
    task: str,
    split: str,
    count: int,
    *,
    extras: Extras | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes `count` scenes of one task (a name of `task_names`) and returns the list file.

    split: "train" or "test"; scenes with unseen recordings go to `test_unseen.json`. A clip is an mp4 (H.264
    and AAC at 8 frames a second) and a wav, a still a png and a wav; tasks that show the same scene share its
    files as hard links. avqa has up to three questions a scene. Records carry the extra field `scene` for
    `describe_mix`. `extras` is needed by actions and emotions.
    """
    if task not in task_names():
        raise TaskError(f"scenes have no task {task!r}; they have {', '.join(task_names())}")
    if split != source.split:
        raise TaskError(f"a source of {source.split} scenes can't write the {split} list")
    if task not in TASKS:
        return write_task(TaskScenes(source, extras), out_dir, task, split, count, progress=progress)
    out = Path(out_dir)
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    found = index = 0
    while found < count:
        scene, name = _scene(source, task, index)
        index += 1
        samples = [s for s in scene.samples if s.task == task][: QUESTIONS_PER_SCENE if task == "avqa" else 1]
        if not samples:
            continue
        media = _write_media(scene, out, task, name)
        for number, sample in enumerate(samples):
            records.append(_record(scene, sample, media, name, number, split))
        found += 1
        if progress:
            progress(found)
    stem = "test_unseen" if split == "test" and source.sounds == "unseen" else split
    path = folder / f"{stem}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    os.replace(temporary, path)
    return path


def _scene(source: SceneSource, task: str, index: int) -> tuple[RenderedScene, str]:
    kind = "still" if task == "arig" else "ave" if task == "ave" else "clip"
    name = f"{source.split}-{source.sounds}-{source.seed}-{kind}-{index:06d}"
    if task == "arig":
        return source.still(index), name
    return source.clip(index, focus="ave" if task == "ave" else None), name


def _record(
    scene: RenderedScene, sample: Sample, media: dict[str, str], name: str, number: int, split: str
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if sample.task in _NAME_FIELD:
        record[_NAME_FIELD[sample.task]] = name
    if sample.task == "avvp":
        record["filename"] = name
    if sample.task == "avqa":
        record["question_id"] = f"{name}-{number}"
    record.update(sample.metadata)
    if sample.task == "arig":
        record["image_path" if split == "train" else "visual_path"] = media["image"]
    elif "video" in media:
        record["video_path"] = media["video"]
    if "audio" in media:
        record["audio_path"] = media["audio"]
    record["scene"] = scene_facts(scene)
    return record


def scene_facts(scene: RenderedScene) -> dict[str, Any]:
    """What the mix is counted from: objects in view, silent ones, sizes, seconds, labels."""
    assert scene.truth is not None
    seen, heard = scene.truth.seen(), scene.truth.heard()
    sizes = {}
    for label, x1, y1, x2, y2, _, _ in scene.boxes:
        sizes.setdefault(label, max(x2 - x1, y2 - y1) / 224)
    sounding = [f.label for f in seen if f.heard]
    return {
        "objects in view": len(seen),
        "silent object in view": any(not f.heard for f in seen),
        "sounds": len(heard),
        "sounding objects in view": len(sounding),
        "size, % of the frame's side": [round(100 * s) for s in sizes.values()],
        "seconds": scene.duration_s,
        "classes in view": [f.label for f in seen],
        "classes heard": [f.label for f in heard],
    }


def _write_media(scene: RenderedScene, out: Path, task: str, name: str) -> dict[str, str]:
    """Files under `<out>/<task>/`; paths are relative to that folder."""
    media: dict[str, str] = {}
    folder = out / task
    if scene.image is not None and scene.stage is not None:
        media["image"] = f"image/{name}.png"
        if not _linked(out, task, media["image"]):
            scene.stage.draw([0.0], scene.duration_s)[0].save(_ready(folder / media["image"]))
    if scene.frames is not None and scene.stage is not None:
        media["video"] = f"video/{name}.mp4"
        if not _linked(out, task, media["video"]):
            times = [i / FPS for i in range(round(scene.duration_s * FPS))]
            write_mp4(
                _ready(folder / media["video"]), scene.stage.draw(times, scene.duration_s), FPS, scene.wave
            )
    if scene.wave is not None:
        media["audio"] = f"audio/{name}.wav"
        if not _linked(out, task, media["audio"]):
            write_wav(_ready(folder / media["audio"]), scene.wave)
    return media


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _linked(out: Path, task: str, relative: str) -> bool:
    """Whether another task's folder already held the file (the same scene) and could lend it."""
    target = out / task / relative
    target.unlink(missing_ok=True)
    for other in TASKS:
        lent = out / other / relative
        if other != task and lent.is_file():
            try:
                os.link(lent, _ready(target))
            except OSError:
                return False
            return True
    return False

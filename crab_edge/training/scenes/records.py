"""Writes scenes of `TaskScenes` as AV-UIE v2 records with their media."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab_edge.training.scenes.kit import FPS, TaskScene
from crab_edge.training.scenes.media import write_mp4, write_wav
from crab_edge.training.scenes.staged import TaskScenes
from crab_edge.training.scenes.truth import Sample

#: Folder and ending of the list for tasks whose records belong to another one's.
_LISTS = {"avqa-music": ("avqa", "music")}
#: Which field names the clip, where the official lists have one.
_NAME_FIELDS = {
    "unav": ("vid",),
    "s4": ("vid", "uid"),
    "ms3": ("vid", "uid"),
    "ref_avs": ("vid", "uid"),
    "avqa_thu": ("video_name", "video_id"),
    "avqa-music": ("video_id",),
}


def list_name(task: str, split: str, unseen: bool) -> tuple[str, str]:
    """Folder and stem of a task's list: ("avqa", "test_music_unseen")."""
    folder, ending = _LISTS.get(task, (task, ""))
    parts = [split, ending, "unseen" if unseen else ""]
    return folder, "_".join(part for part in parts if part)


def write_task(
    scenes: TaskScenes,
    out_dir: str | Path,
    task: str,
    split: str,
    count: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes `count` scenes and returns the list file.

    Clips are mp4 and wav (matching's clips are silent mp4: their own sound would tell); stills are jpg in
    `media/<name>/frames/`, their masks png where the official evaluation looks for them, named by the
    field `mask_path` too.
    """
    source = scenes.source
    folder_name, stem = list_name(task, split, split == "test" and source.sounds == "unseen")
    folder = Path(out_dir) / folder_name
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index in range(count):
        scene = scenes.scene(task, index)
        name = f"{split}-{source.sounds}-{source.seed}-{task}-{index:06d}"
        media = _write_media(scene, folder, name, split)
        for number, sample in enumerate(scene.samples):
            records.append(_record(scene, sample, media, name, number))
        if progress:
            progress(index + 1)
    path = folder / f"{stem}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    os.replace(temporary, path)
    return path


def _record(
    scene: TaskScene, sample: Sample, media: dict[str, str], name: str, number: int
) -> dict[str, Any]:
    record: dict[str, Any] = dict.fromkeys(_NAME_FIELDS.get(scene.task, ()), name)
    if scene.task == "avqa-music":
        record["question_id"] = f"{name}-{number}"
    return record | sample.metadata | media | {"scene": scene.facts}


def _write_media(scene: TaskScene, folder: Path, name: str, split: str) -> dict[str, str]:
    """Files of one scene; field -> path relative to `folder`."""
    media: dict[str, str] = {}
    for number, film in enumerate(scene.films, 1):
        several = len(scene.films) > 1
        label = f"{scene.samples[0].metadata['label']}/" if scene.task == "ucf" else ""
        relative = f"video/{label}{name}{f'-{number}' if several else ''}.mp4"
        write_mp4(_ready(folder / relative), film.images(), FPS, film.wave)
        media[f"video{number if several else ''}_path"] = relative
    if scene.picture is not None:
        media |= _write_still(scene, folder, name, split)
    for number, wave in enumerate(scene.waves, 1):
        several = len(scene.waves) > 1
        label = f"{scene.samples[0].metadata['label']}/" if scene.task == "ucf" else ""
        relative = f"audio/{label}{name}{f'-{number}' if several else ''}.wav"
        write_wav(_ready(folder / relative), wave)
        media[f"audio{number if several else ''}_path"] = relative
    return media


def _write_still(scene: TaskScene, folder: Path, name: str, split: str) -> dict[str, str]:
    assert scene.picture is not None and scene.mask is not None
    relative = f"media/{name}/frames/{scene.frame}.jpg"
    scene.picture.save(_ready(folder / relative), quality=95)
    if scene.task == "ref_avs":
        fid = scene.samples[0].metadata["fid"]
        mask = f"gt_mask/{name}/fid_{fid}/{scene.frame:05d}.png"
    else:
        mask = f"media/{name}/labels_rgb/{scene.frame}.png"
    Image.fromarray(scene.mask.astype(np.uint8) * 255).save(_ready(folder / mask))
    return {"image_path" if split == "train" else "visual_path": relative, "mask_path": mask}


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

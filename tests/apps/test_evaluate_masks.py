"""`crab-edge evaluate` on segmentation tasks: masks made, kept, or impossible."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from crab_edge_apps import _results_table as results_table
from crab_edge_apps import evaluate as verb
from crab_edge_apps import score as score_verb
from PIL import Image

from crab_edge import masks, tasks
from crab_edge.errors import DependencyError, InputError
from crab_edge.results import Box, MaskFile, Points, Unparsed, results_to_json
from tests.apps.scripted import FakeModel, install, lines_of, write_lists

SEEN = "[10,10,100,100] [50,50]"


def outlines(text, context):
    """Box and point of "[x1,y1,x2,y2] [x,y]"."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if len(numbers) != 6:
        return (Unparsed("no box and point"),)
    return (Box("dog", *numbers[:4]), Points("dog", (tuple(numbers[4:]),)))


@pytest.fixture
def mask_task():
    yield tasks.register(
        dataclasses.replace(
            tasks.get("arig"),
            name="cut_out",
            parse=outlines,
            render=lambda results, context=None: SEEN,
            truth=lambda record: (MaskFile("dog", Path(record["mask"])),),
            metric="avs",
            bars={},
        )
    )
    tasks.unregister("cut_out")


@pytest.fixture
def mask_data(tmp_path):
    """Three pictures of a red square on green, [20, 80) in both directions of 224, stored at 112 and 224."""
    names = {"a": 224, "b": 112, "c": 224}
    records = [
        {
            "vid": name,
            "visual_path": f"image/{name}.png",
            "audio_path": f"{name}.wav",
            "mask": f"mask/{name}.png",
        }
        for name in names
    ]
    data = write_lists(tmp_path / "AVUIE_2", {"cut_out/test": records})
    (data / "cut_out" / "mask").mkdir()
    for name, side in names.items():
        inside = np.zeros((224, 224), bool)
        inside[20:80, 20:80] = True
        picture = np.where(inside[:, :, None], (200, 20, 20), (20, 120, 30)).astype(np.uint8)
        Image.fromarray(picture).resize((side, side), 0).save(data / "cut_out" / "image" / f"{name}.png")
        Image.fromarray(inside.astype(np.uint8) * 255).save(data / "cut_out" / "mask" / f"{name}.png")
    return data


def test_masks_are_made_and_compared(mask_task, mask_data, monkeypatch, tmp_path):
    pytest.importorskip("cv2")
    monkeypatch.delenv(masks.WEIGHTS_VARIABLE, raising=False)
    install(monkeypatch, FakeModel(lambda name, task, question: "nothing" if name == "c" else SEEN))
    report = verb.run(None, mask_data, ["cut_out"], out=tmp_path)
    found = {name: line.figure.value for (_, _, name), line in lines_of(report).items()}
    assert found["J (valid only)"] > 80
    assert found["J (invalid = 0)"] == pytest.approx(2 / 3 * found["J (valid only)"])
    assert report.scores[0].mask_tools == ("grabcut",)
    assert "cut_out test: masks made by grabcut" in results_table._notes(report)
    # The lines hold box and points alone, the pictures are found again in the data folder.
    [path] = tmp_path.glob("fake*/inference_cut_out.jsonl")
    again = score_verb.run([path], data=mask_data)
    assert [line.figure for line in again.scores[0].lines] == [line.figure for line in report.scores[0].lines]
    with pytest.raises(InputError, match="can't be read"):
        score_verb.run([path])


def test_masks_of_the_answer_are_kept(mask_task, mask_data, monkeypatch, tmp_path):
    full = masks.from_bits(np.ones((50, 60), bool), "dog", "sam2")

    class Cutter(FakeModel):
        def _ask(self, *asked):
            answer = super()._ask(*asked)
            return dataclasses.replace(answer, parsed=(*answer.parsed, full))

    monkeypatch.setattr(masks, "choose", lambda: ("sam2", None))
    install(monkeypatch, Cutter(lambda name, task, question: SEEN))
    report = verb.run(None, mask_data, ["cut_out"], out=tmp_path)
    assert report.scores[0].mask_tools == ("sam2",)
    value = lines_of(report)["cut_out", "test", "J (valid only)"].figure.value
    assert value == pytest.approx(100 * 60 * 60 / 224**2)
    [path] = tmp_path.glob("fake*/inference_cut_out.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    assert row["crab_edge"]["masks"] == json.loads(json.dumps(results_to_json([full])))
    assert row["crab_edge"]["masks"][0]["counts"] == [0, 3000]
    # Nothing has to be segmented again, so that no tool and no pictures are needed.
    monkeypatch.setattr(masks, "choose", lambda: pytest.fail("no mask is to be made"))
    assert score_verb.run([path], data=mask_data).scores[0].lines[0].figure.value == pytest.approx(value)


def test_masks_that_cant_be_made_stop_the_run_before_it_begins(mask_task, mask_data, model, monkeypatch):
    def missing():
        raise DependencyError("masks need OpenCV")

    monkeypatch.setattr(masks, "choose", missing)
    with pytest.raises(DependencyError):
        verb.run(None, mask_data, ["cut_out"])
    assert not model.opened


# The verb

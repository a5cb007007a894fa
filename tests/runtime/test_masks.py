"""Masks: run lengths, sizes, files, the tools and which of them is used."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from crab_edge import masks, masks_grabcut, masks_sam2
from crab_edge.errors import DependencyError, InputError, TaskError
from crab_edge.results import Box, Choice, Mask, Points


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.delenv(masks.WEIGHTS_VARIABLE, raising=False)


# Run lengths


def test_run_lengths_go_column_by_column_and_begin_with_zeros():
    bits = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert masks.encode(bits) == (2, 1, 1, 2)
    assert masks.encode(~bits) == (0, 2, 1, 1, 2)
    assert masks.encode(np.zeros((2, 3), bool)) == (6,)
    assert masks.encode(np.ones((2, 3), bool)) == (0, 6)


def test_decode_undoes_encode():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 7), (16, 3)):
        for share in (0, 0.3, 1):
            bits = rng.random(shape) < share
            mask = masks.from_bits(bits, "dog", "test")
            assert (mask.height, mask.width) == shape
            np.testing.assert_array_equal(masks.decode(mask), bits)


def test_runs_that_dont_fill_the_mask():
    with pytest.raises(InputError, match=r"the mask of 'dog' has runs of 5 pixels, expected 2 x 3"):
        masks.decode(Mask("dog", 2, 3, (2, 3), "x"))


def test_a_mask_at_another_size():
    bits = np.zeros((4, 4), bool)
    bits[:2, 2:] = True
    wide = masks.resized(masks.from_bits(bits, "dog", "test"), 16, 8)
    assert (wide.width, wide.height, wide.label, wide.source) == (16, 8, "dog", "test")
    out = masks.decode(wide)
    assert out[:4, 8:].all() and out.sum() == 32


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_truth_pictures_of_several_kinds(tmp_path, mode):
    values = np.zeros((4, 6), np.uint8)
    values[1, 2:5] = 200
    picture = Image.fromarray(values)
    if mode == "RGB":  # one colour an object
        picture = Image.fromarray(np.stack([values, values // 2, values * 0], axis=2))
    elif mode == "P":
        picture = Image.fromarray((values > 0).astype(np.uint8), mode=None).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0])
    elif mode == "1":
        picture = picture.point(lambda v: 255 * (v > 0)).convert("1")
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(masks.read(tmp_path / "m.png"), values > 0)


def test_a_mask_file_that_isnt_there(tmp_path):
    with pytest.raises(InputError, match="the mask can't be read"):
        masks.read(tmp_path / "none.png")


# Objects of an answer


def test_boxes_and_points_of_one_label_are_one_object():
    box, other = Box("dog", 0, 0, 9, 9), Box("dog", 20, 20, 29, 29)
    first, second = Points("dog", ((1, 1),)), Points("dog", ((2, 2),))
    found = masks.objects([box, first, second, Choice("true"), other, Points("", ((21, 21),))])
    assert found == [(box, Points("dog", ((1, 1), (2, 2)))), (other, Points("", ((21, 21),)))]
    assert masks.objects([first, box]) == [(box, first)]
    assert masks.objects([Box("cat", 0, 0, 1, 1), first]) == [(Box("cat", 0, 0, 1, 1), None), (None, first)]
    assert masks.objects([]) == []


# GrabCut


def picture_of_a_disc(width=120, height=90):
    rng = np.random.default_rng(0)
    frame = np.full((height, width, 3), (30, 120, 40), np.uint8) + rng.integers(0, 12, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    disc = (columns - 60) ** 2 + (rows - 40) ** 2 < 20**2
    frame[disc] = (200, 30, 30)
    return frame.astype(np.uint8), disc


def iou(mask, truth):
    bits = masks.decode(mask)
    return (bits & truth).sum() / (bits | truth).sum()


@pytest.mark.parametrize(
    ("box", "points"),
    [
        (Box("disc", 35, 15, 85, 65), None),
        (Box("disc", 35, 15, 85, 65), Points("disc", ((60, 40), (50, 40), (70, 45)))),
        (None, Points("disc", ((60, 40), (50, 40), (70, 45)))),
        (Box("disc", 0, 0, 120, 90), None),  # no background is left outside
        (Box("disc", -20, -5, 500, 500), None),
    ],
)
def test_grabcut_finds_the_disc(box, points):
    pytest.importorskip("cv2")
    frame, disc = picture_of_a_disc()
    mask = masks.segment(frame, box, points)
    assert mask.source == "grabcut" and mask.label == "disc" and (mask.width, mask.height) == (120, 90)
    assert iou(mask, disc) > 0.95
    assert masks.segment(frame, box, points) == mask


def test_grabcut_makes_large_frames_smaller(monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr(masks_grabcut, "LONGEST_SIDE", 60)
    frame, disc = picture_of_a_disc()
    mask = masks.segment(frame, Box("disc", 35, 15, 85, 65), None)
    assert (mask.width, mask.height) == (120, 90) and iou(mask, disc) > 0.85


def test_a_picture_of_one_colour_and_a_tiny_one():
    pytest.importorskip("cv2")
    flat = np.zeros((30, 30, 3), np.uint8)
    masks.segment(flat, Box("x", 5, 5, 20, 20), None)
    assert masks.segment(flat[:2, :2], Box("x", 0, 0, 2, 2), None).counts == (0, 4)


def test_masks_come_back_in_the_frames_own_pixels():
    pytest.importorskip("cv2")
    frame, disc = picture_of_a_disc()
    box = Box("disc", 70, 30, 170, 130)  # of a frame of twice the size
    results = masks.add_masks((Choice("true"), box), frame[None], size=(240, 180))
    assert results[:2] == (Choice("true"), box)
    mask = results[2]
    assert (mask.width, mask.height) == (240, 180)
    assert iou(masks.resized(mask, 120, 90), disc) > 0.95
    assert masks.add_masks((Choice("false"),), frame) == (Choice("false"),)


# Which tool


def test_without_opencv_the_extra_is_named(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'cv2'", name="cv2")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r"pip install 'crab-edge\[segment\]'"):
        masks.segment(np.zeros((4, 4, 3), np.uint8), Box("x", 0, 0, 2, 2), None)


def test_what_cant_be_segmented(tmp_path):
    frame = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(TaskError, match="neither"):
        masks.segment(frame, None, Points("x", ()))
    with pytest.raises(InputError, match=r"expected a frame uint8 \[H, W, 3\], got float32 \[4, 4\]"):
        masks.segment(np.zeros((4, 4), np.float32), Box("x", 0, 0, 1, 1), None)
    with pytest.raises(InputError, match="unknown mask tool 'magic'"):
        masks.choose("magic")
    with pytest.raises(InputError, match="SAM 2 needs weights"):
        masks.choose("sam2")
    with pytest.raises(InputError, match="no such SAM 2 weights"):
        masks.choose(weights=tmp_path / "none")


def test_weights_choose_sam2(tmp_path, monkeypatch):
    monkeypatch.setattr(masks_grabcut, "opencv", lambda: None)
    assert masks.choose() == ("grabcut", None)
    assert masks.choose(weights=tmp_path) == ("sam2", tmp_path)
    with masks.using(weights=tmp_path):
        assert masks.choose() == ("sam2", tmp_path)
        assert masks.choose("grabcut") == ("grabcut", None)
    monkeypatch.setenv(masks.WEIGHTS_VARIABLE, str(tmp_path))
    assert masks.choose() == ("sam2", tmp_path)
    with masks.using("grabcut"):
        assert masks.choose() == ("grabcut", None)


# SAM 2


class Graph:
    """Stands in for an ONNX Runtime session: names, shapes and types of its tensors, and a function."""

    def __init__(self, inputs, outputs, run):
        self._inputs, self._outputs, self._run = inputs, outputs, run
        self.given = {}

    def get_inputs(self):
        return [SimpleNamespace(name=n, shape=s, type=f"tensor({t})") for n, s, t in self._inputs]

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in self._outputs]

    def run(self, names, given):
        self.given = given
        assert set(given) == {name for name, _, _ in self._inputs}
        for name, shape, kind in self._inputs:
            value = given[name]
            assert value.ndim == len(shape), name
            assert value.dtype == {"float": np.float32, "int32": np.int32, "int64": np.int64}[kind], name
        return self._run(given)


def square(corners, side=64):
    """Logits [side, side], positive inside the corners given in a square of 256."""
    (x1, y1), (x2, y2) = np.asarray(corners) * side / 256
    rows, columns = np.mgrid[:side, :side] + 0.5
    return np.where((columns > x1) & (columns < x2) & (rows > y1) & (rows < y2), 4.0, -4.0).astype(np.float32)


def exports():
    """Encoder and decoder of the three ONNX exports in use, at a side of 256."""

    def masks_of(points):
        corners = points.reshape(-1, 2)[:2]
        return np.stack([square(corners), square(corners + 500), square(corners + 500)])[None]

    scores = np.array([[0.9, 0.1, 0.2]], np.float32)
    high = np.zeros((1, 2, 8, 8), np.float32)
    yield (
        Graph(
            [("image", [1, 3, 256, 256], "float")],
            ["high_res_feats_0", "high_res_feats_1", "image_embed"],
            lambda given: [high, high, high],
        ),
        Graph(
            [
                ("image_embed", [1, 2, 8, 8], "float"),
                ("high_res_feats_0", [1, 2, 8, 8], "float"),
                ("high_res_feats_1", [1, 2, 8, 8], "float"),
                ("point_coords", ["n", "p", 2], "float"),
                ("point_labels", ["n", "p"], "float"),
                ("mask_input", ["n", 1, 64, 64], "float"),
                ("has_mask_input", ["n"], "float"),
                ("orig_im_size", [2], "int64"),
            ],
            ["masks", "iou_predictions"],
            lambda given: [masks_of(given["point_coords"]), scores],
        ),
    )
    yield (
        Graph(
            [("image", [1, 3, 256, 256], "float")],
            ["image_features_0", "image_features_1", "image_embeddings"],
            lambda given: [high, high, high],
        ),
        Graph(
            [
                ("image_features_0", [1, 2, 8, 8], "float"),
                ("image_features_1", [1, 2, 8, 8], "float"),
                ("image_embeddings", [1, 2, 8, 8], "float"),
                ("point_coords", ["n", "p", 2], "float"),
                ("point_labels", ["n", "p"], "int32"),
                ("input_masks", ["n", 1, 64, 64], "float"),
                ("has_input_masks", ["n"], "float"),
                ("original_image_size", [2], "int32"),
            ],
            ["masks", "iou_predictions", "low_res_masks"],
            lambda given: [
                np.zeros((1, 1, 90, 120), bool),
                scores[:, :1],
                masks_of(given["point_coords"])[:, :1],
            ],
        ),
    )
    yield (
        Graph(
            [("pixel_values", ["b", 3, 256, 256], "float")],
            ["image_embeddings.0", "image_embeddings.1", "image_embeddings.2"],
            lambda given: [high, high, high],
        ),
        Graph(
            [
                ("input_points", ["b", 1, "p", 2], "float"),
                ("input_labels", ["b", 1, "p"], "int64"),
                ("input_boxes", ["b", "k", 4], "float"),
                ("image_embeddings.0", [1, 2, 8, 8], "float"),
                ("image_embeddings.1", [1, 2, 8, 8], "float"),
                ("image_embeddings.2", [1, 2, 8, 8], "float"),
            ],
            ["iou_scores", "pred_masks", "object_score_logits"],
            lambda given: [scores[None], masks_of(given["input_points"])[None], scores[:, :1]],
        ),
    )


@pytest.mark.parametrize("graphs", exports(), ids=["exporter", "runtime", "transformers"])
def test_sam2_through_onnx(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(masks_sam2, "_sessions", lambda folder: graphs)
    frame, _ = picture_of_a_disc()
    points = Points("disc", ((60, 40),))
    mask = masks.segment(frame, Box("disc", 40, 20, 80, 60), points, weights=tmp_path)
    assert mask.source == "sam2" and (mask.width, mask.height) == (120, 90)
    truth = np.zeros((90, 120), bool)
    truth[20:60, 40:80] = True
    assert iou(mask, truth) > 0.85
    encoder, decoder = graphs
    [pixels] = encoder.given.values()
    assert pixels.shape == (1, 3, 256, 256) and abs(float(pixels.mean())) < 3
    coordinates = next(v for k, v in decoder.given.items() if k in ("point_coords", "input_points"))
    labels = next(v for k, v in decoder.given.items() if "labels" in k)
    # Straight stretch to the encoder's square; the box is its corners, labelled 2 and 3.
    expected = np.array([[40, 20], [80, 60], [60, 40]]) * [256 / 120, 256 / 90]
    np.testing.assert_allclose(coordinates.reshape(-1, 2), expected, rtol=1e-6)
    assert labels.ravel().tolist() == [2, 3, 1]


def test_an_export_that_isnt_known(tmp_path, monkeypatch):
    encoder, _ = next(exports())
    odd = Graph([("prompt", ["n"], "float")], ["masks"], None)
    monkeypatch.setattr(masks_sam2, "_sessions", lambda folder: (encoder, odd))
    frame = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match="an input prompt that isn't known"):
        masks.segment(frame, Box("x", 0, 0, 4, 4), None, weights=tmp_path)


def test_graphs_of_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"expected \*encoder\*.onnx and \*decoder\*.onnx"):
        masks_sam2.graphs(tmp_path)
    (tmp_path / "onnx").mkdir()
    names = ("vision_encoder.onnx", "prompt_encoder_mask_decoder.onnx", "vision_encoder_fp16.onnx")
    for name in names:
        (tmp_path / "onnx" / name).touch()
    assert [path.name for path in masks_sam2.graphs(tmp_path)] == list(names[:2])


def test_sam2_package(tmp_path, monkeypatch):
    checkpoint = tmp_path / "sam2.1_hiera_large.pt"
    checkpoint.touch()
    built = []

    class Predictor:
        def __init__(self, model):
            built.append(model)

        def set_image(self, frame):
            self.shape = frame.shape[:2]

        def predict(self, **given):
            built.append(given)
            return np.ones((1, *self.shape), np.float32), None, None

    modules = {
        "sam2.build_sam": SimpleNamespace(build_sam2=lambda *args, device: (*args, device)),
        "sam2.sam2_image_predictor": SimpleNamespace(SAM2ImagePredictor=Predictor),
    }
    monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(masks_sam2.sys.modules, "torch", torch)
    masks_sam2._predictor.cache_clear()
    frame = np.zeros((6, 8, 3), np.uint8)
    mask = masks.segment(frame, None, Points("x", ((1, 2),)), weights=checkpoint)
    assert mask.source == "sam2" and mask.counts == (0, 48)
    assert built[0] == ("configs/sam2.1/sam2.1_hiera_l.yaml", str(checkpoint), "cpu")
    assert built[1]["box"] is None and built[1]["multimask_output"] is False
    masks_sam2._predictor.cache_clear()


def test_checkpoints_that_cant_be_used(tmp_path):
    frame, box = np.zeros((6, 8, 3), np.uint8), Box("x", 0, 0, 4, 4)
    (tmp_path / "sam.bin").touch()
    with pytest.raises(InputError, match="expected a folder with SAM 2's ONNX encoder"):
        masks.segment(frame, box, None, weights=tmp_path / "sam.bin")
    (tmp_path / "mine.pt").touch()
    if importlib.util.find_spec("sam2") is None:
        with pytest.raises(DependencyError, match="pip install sam2"):
            masks.segment(frame, box, None, weights=tmp_path / "mine.pt")

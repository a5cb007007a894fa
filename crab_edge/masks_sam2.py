"""SAM 2 on one picture: through its ONNX export and ONNX Runtime, or through the `sam2` package.

The three ONNX exports in use name their tensors differently; inputs are recognised by what their names hold.
An encoder takes the picture and gives its features, a decoder takes the features and the prompt.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crab_edge.errors import DependencyError, InputError

Bits = NDArray[np.bool_]
_SIDE = 1024
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_TYPES: dict[str, type] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
#: Labels of prompt points.
_OBJECT, _TOP_LEFT, _BOTTOM_RIGHT = 1, 2, 3
#: Checkpoint stem -> configuration in the package.
_CONFIGS = {
    "hiera_tiny": "hiera_t",
    "hiera_small": "hiera_s",
    "hiera_base_plus": "hiera_b+",
    "hiera_large": "hiera_l",
}


def segment(
    frame: NDArray[np.uint8],
    box: tuple[float, float, float, float] | None,
    points: Sequence[tuple[float, float]],
    weights: Path,
) -> Bits:
    """bool [H, W]: the object's pixels in frame uint8 [H, W, 3]; one mask, as in Crab+'s mask stage.

    weights: a folder with `*encoder*.onnx` and `*decoder*.onnx`, or a `.pt` checkpoint for the package.
    """
    if weights.is_dir():
        return _with_onnx(frame, box, points, weights)
    if weights.suffix in (".pt", ".pth"):
        return _with_package(frame, box, points, weights)
    raise InputError(
        f"{weights}: expected a folder with SAM 2's ONNX encoder and decoder, or a .pt checkpoint"
    )


# ONNX Runtime


def graphs(folder: Path) -> tuple[Path, Path]:
    """Encoder and decoder in a folder (or its folder `onnx`); InputError when there isn't one of each."""
    for place in (folder, folder / "onnx"):
        found = sorted(place.glob("*.onnx"), key=lambda path: (len(path.name), path.name))
        encoders = [p for p in found if "encoder" in p.stem and "decoder" not in p.stem]
        decoders = [p for p in found if "decoder" in p.stem]
        if encoders and decoders:
            return encoders[0], decoders[0]
    raise InputError(
        f"{folder}: expected *encoder*.onnx and *decoder*.onnx of SAM 2's export, found neither pair"
    )


@lru_cache(maxsize=1)
def _sessions(folder: Path) -> tuple[Any, Any]:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        way = "`pip install 'crab-edge[cpu]'`"
        raise DependencyError(
            f"SAM 2's ONNX export needs onnxruntime, which isn't installed; run {way}"
        ) from error
    encoder, decoder = graphs(folder)
    providers = runtime.get_available_providers()
    return (
        runtime.InferenceSession(str(encoder), providers=providers),
        runtime.InferenceSession(str(decoder), providers=providers),
    )


def _with_onnx(
    frame: NDArray[np.uint8],
    box: tuple[float, float, float, float] | None,
    points: Sequence[tuple[float, float]],
    folder: Path,
) -> Bits:
    encoder, decoder = _sessions(folder)
    [picture] = encoder.get_inputs()
    side = picture.shape[-1] if isinstance(picture.shape[-1], int) else _SIDE
    pixels: NDArray[Any] = _pixels(frame, side).astype(_TYPES.get(picture.type, np.float32))
    names = [output.name for output in encoder.get_outputs()]
    features = dict(zip(names, encoder.run(names, {picture.name: pixels}), strict=True))
    height, width = frame.shape[:2]
    scale = np.array([side / width, side / height], np.float32)
    prompt, labels = _prompt(box, points, scale)
    given = {
        item.name: _decoder_input(item, features, prompt, labels, (height, width))
        for item in decoder.get_inputs()
    }
    outputs = [output.name for output in decoder.get_outputs()]
    out = dict(zip(outputs, decoder.run(outputs, given), strict=True))
    return _best(out, width, height)


def _pixels(frame: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """float32 [1, 3, side, side]: stretched, normalised."""
    square = Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR)
    values = (np.asarray(square, np.float32) / 255 - _MEAN) / _STD
    return values.transpose(2, 0, 1)[None]


def _prompt(
    box: tuple[float, float, float, float] | None,
    points: Sequence[tuple[float, float]],
    scale: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Coordinates [N, 2] in the encoder's square and their labels [N]; a box is its two corners."""
    xy = [tuple(box[:2]), tuple(box[2:])] if box is not None else []
    labels = [_TOP_LEFT, _BOTTOM_RIGHT] if box is not None else []
    xy += list(points)
    labels += [_OBJECT] * len(points)
    return np.array(xy, np.float32).reshape(-1, 2) * scale, np.array(labels, np.int64)


def _decoder_input(
    item: Any,
    features: dict[str, NDArray[Any]],
    prompt: NDArray[np.float32],
    labels: NDArray[np.int64],
    size: tuple[int, int],
) -> NDArray[Any]:
    name, rank = item.name, len(item.shape)
    kind = _TYPES.get(item.type, np.float32)
    if name in features:
        return features[name]
    if "box" in name:  # the corners are among the points
        return np.zeros((1, 0, 4), kind)
    if name.startswith("has"):
        return np.zeros([1] * rank, kind)
    if "size" in name:
        return np.array(size, kind)
    if "mask" in name:
        sides = [n if isinstance(n, int) else _SIDE // 4 for n in item.shape[-2:]]
        return np.zeros([1] * (rank - 2) + sides, kind)
    if "label" in name or "point" in name:
        value: NDArray[Any] = labels if "label" in name else prompt
        return value.reshape((1,) * (rank - value.ndim) + value.shape).astype(kind)
    raise InputError(f"SAM 2's decoder has an input {name} that isn't known; use a common export")


def _best(out: dict[str, NDArray[Any]], width: int, height: int) -> Bits:
    """The mask with the highest predicted IoU, at the frame's size."""
    named = sorted((name for name in out if "mask" in name), key=lambda name: "low_res" not in name)
    if not named:
        raise InputError(f"SAM 2's decoder gives {', '.join(out)}, expected masks; use a common export")
    logits = out[named[0]].astype(np.float32)
    logits = logits.reshape(-1, *logits.shape[-2:])
    scores = next((value for name, value in out.items() if "iou" in name), None)
    best = 0 if scores is None or len(logits) == 1 else int(np.argmax(scores.reshape(-1)[: len(logits)]))
    picture = Image.fromarray(logits[best]).resize((width, height), Image.Resampling.BILINEAR)
    # Masks that come as yes and no are 1 and 0, logits are cut at 0.
    binary = bool(np.isin(logits[best], (0.0, 1.0)).all())
    return np.asarray(picture) > (0.5 if binary else 0.0)


# The sam2 package


@lru_cache(maxsize=1)
def _predictor(checkpoint: Path) -> Any:
    try:
        builder = importlib.import_module("sam2.build_sam")
        image = importlib.import_module("sam2.sam2_image_predictor")
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{checkpoint.name} needs the sam2 package (missing: {error.name}); "
            "run `pip install sam2`, or give the folder of SAM 2's ONNX export"
        ) from error
    stem = checkpoint.stem
    version, _, size = stem.partition("_")
    if size not in _CONFIGS or version not in ("sam2", "sam2.1"):
        known = ", ".join(f"sam2.1_{name}.pt" for name in _CONFIGS)
        raise InputError(f"{checkpoint}: can't tell the model from the name; expected {known}")
    torch = sys.modules["torch"]  # the package has imported it; the runtime itself never does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = f"configs/{version}/{version}_{_CONFIGS[size]}.yaml"
    return image.SAM2ImagePredictor(builder.build_sam2(config, str(checkpoint), device=device))


def _with_package(
    frame: NDArray[np.uint8],
    box: tuple[float, float, float, float] | None,
    points: Sequence[tuple[float, float]],
    checkpoint: Path,
) -> Bits:
    predictor = _predictor(checkpoint)
    predictor.set_image(frame)
    masks, _, _ = predictor.predict(
        point_coords=np.array(points, np.float32).reshape(-1, 2) if points else None,
        point_labels=np.ones(len(points), np.int32) if points else None,
        box=None if box is None else np.array(box, np.float32),
        multimask_output=False,
    )
    return np.asarray(masks[0]) > 0

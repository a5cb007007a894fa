"""Reading a `torch.save` file of plain tensors without running anything that it carries."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from crab_edge.errors import ModelError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A file's flat dictionary of float tensors, mapped: nothing is read before it is used.

    ModelError for anything else: a file that is truncated, a pickle that would call something, the old
    format that can't be mapped, values that aren't dense tensors of bf16, fp16 or fp32.
    """
    _check_container(path)
    try:
        calls = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # whatever a broken pickle makes its disassembler raise
        raise ModelError(f"{path}: not a file of torch.save ({_first_line(error)})") from None
    if calls:
        raise ModelError(
            f"{path}: refused, its pickle would call {', '.join(calls[:3])}: a file of weights holds tensors "
            "only; don't open it with anything else either"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
    ) as error:
        raise ModelError(f"{path}: can't be read as tensors ({_first_line(error)}); copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"{path}: holds a {type(found).__name__}, expected a dictionary of named tensors")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{path}: {name} is a {type(value).__name__}, expected a tensor: give finetune_weights.bin, "
                "not a whole training state"
            )
        if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type != "cpu":
            kind = f"{str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"
            raise ModelError(f"{path}: {name} is {kind}, expected a dense tensor of bf16, fp16 or fp32")
    return {name: value.detach() for name, value in found.items()}


def _check_container(path: Path) -> None:
    """ModelError unless `path` is a zip with a pickle, as torch.save has written since 2020."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        is_zip = zipfile.is_zipfile(path)
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror}); expected finetune_weights.bin") from None
    if is_zip:
        return
    if start.startswith(b"PK"):
        raise ModelError(
            f"{path}: is truncated ({path.stat().st_size:,} bytes, its end is missing): copy it again"
        )
    if start.startswith(b"\x80"):
        raise ModelError(
            f"{path}: is in torch's old format without a zip, which can't be mapped; save it anew "
            "with torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    if start.startswith(b"vers"):
        raise ModelError(f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull`")
    raise ModelError(f"{path}: not a file of torch.save; expected finetune_weights.bin")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

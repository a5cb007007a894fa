"""Configurations for `accelerate launch --config_file`: how an adapter's training is spread over devices."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from crab_edge.errors import InputError

NAMES = ("ddp", "fsdp", "deepspeed_zero2")


def path(name: str) -> Path:
    """The file of a configuration; InputError lists the names."""
    if name not in NAMES:
        raise InputError(f"no launch configuration {name!r}: choose one of {', '.join(NAMES)}")
    return Path(str(files(__package__).joinpath(f"{name}.yaml")))

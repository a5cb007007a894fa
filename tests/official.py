"""Tiny models in the official form: a Hugging Face directory of Qwen2.5-Omni and Crab+'s adapter file."""

from __future__ import annotations

import json
from pathlib import Path

RANK, ALPHA = 8, 16


def make_official_dir(folder: Path, *, shard_bytes: int = 100_000, seed: int = 0) -> Path:
    """A directory with the thinker of tests.tiny_model in several bf16 shards, and a talker's file."""
    import crab_edge_export.random_model as random_model
    import torch
    from safetensors.torch import save_file

    from tests.tiny import tiny_tokenizer
    from tests.tiny_model import tiny_config

    folder = Path(folder)
    config = tiny_config(tiny_tokenizer(folder.parent / f"{folder.name}.tokenizer.json"))
    whole, random_model.SHARD_BYTES = random_model.SHARD_BYTES, shard_bytes
    try:
        random_model.write_base(config, folder, seed=seed)
    finally:
        random_model.SHARD_BYTES = whole
    save_file({"talker.model.norm.weight": torch.zeros(4)}, folder / "model-talker.safetensors")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["talker.model.norm.weight"] = "model-talker.safetensors"
    places["weight_map"]["token2wav.dit.weight"] = "model-never-fetched.safetensors"
    index.write_text(json.dumps(places))
    return folder


def make_official_adapter(base: Path, file: Path, *, towers: bool = False, experts: int = 3) -> Path:
    """`finetune_weights.bin` for a directory of `make_official_dir`, bf16."""
    from crab_edge_export.random_model import write_adapter

    from crab_edge.model import load_config

    return write_adapter(load_config(base), file, rank=RANK, experts=experts, towers=towers)


def hollow_adapter(size: str, *, rank: int = 128, experts: int = 3) -> dict:
    """All keys and shapes of a true adapter, every tensor a view of one zero: a small file when saved."""
    import torch

    from crab_edge.model import official_config, target_linears
    from crab_edge.model.adapter import adapter_shapes
    from crab_edge.model.base import on_meta
    from crab_edge.weight_names import canonical, official

    linears = {canonical(n): widths for n, widths in target_linears(on_meta(official_config(size))).items()}
    zero = torch.zeros(1, dtype=torch.bfloat16)
    return {
        f"base_model.model.{official(name)}": zero.expand(shape)
        for name, shape in adapter_shapes(linears, rank, experts).items()
    }

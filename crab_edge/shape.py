"""The sizes of a model: from its configuration, its directory, or known by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge.errors import ModelError
from crab_edge.manifest import ShapeInfo

# What transformers' configuration classes assume where a config.json is silent.
_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "window_size": 112,
}
_AUDIO = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "n_window": 100,
    "output_dim": 3584,
}


@dataclass(frozen=True)
class AdapterShape:
    """I-LoRA: rank r, N experts; `towers` says whether the encoders' experts do anything."""

    rank: int
    experts: int
    towers: bool = True


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the decoder, of both encoders (by the names of their configurations) and of the adapter."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    vision: Mapping[str, int]
    audio: Mapping[str, int]
    adapter: AdapterShape | None = None

    @property
    def decoder_linears(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of a layer's seven linears."""
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("q", inner, self.hidden),
            ("k", kv, self.hidden),
            ("v", kv, self.hidden),
            ("o", self.hidden, inner),
            ("gate", self.intermediate, self.hidden),
            ("up", self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        ]

    @property
    def layer_parameters(self) -> int:
        """Weights, biases and norms of one decoder layer, the adapter left out."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim
        return sum(n * k for _, n, k in self.decoder_linears) + biases + 2 * self.hidden

    @property
    def layer_adapter_parameters(self) -> int:
        """Parameters of I-LoRA in one decoder layer."""
        if self.adapter is None:
            return 0
        r, experts = self.adapter.rank, self.adapter.experts
        return sum((r + experts) * k + r * experts * n for _, n, k in self.decoder_linears)

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the decoder with embedding and head, adapters left out."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + self.hidden + tables


def from_config(config: Mapping[str, Any], name: str, adapter: AdapterShape | None = None) -> ModelShape:
    """The shape that a thinker's config.json describes; a whole Omni model's counts by its thinker."""
    config = config.get("thinker_config", config)
    try:
        text = _TEXT | dict(config["text_config"])
        vision = {key: int((_VISION | dict(config["vision_config"]))[key]) for key in _VISION}
        audio = {key: int((_AUDIO | dict(config["audio_config"]))[key]) for key in _AUDIO}
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        return ModelShape(
            name=name,
            hidden=hidden,
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text["num_key_value_heads"] or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            vocab=int(text["vocab_size"]),
            max_positions=int(text["max_position_embeddings"]),
            tied=bool(config.get("tie_word_embeddings", text["tie_word_embeddings"])),
            vision=vision,
            audio=audio,
            adapter=adapter,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{name}: config.json doesn't describe a Qwen2.5-Omni thinker ({error!r})") from None


def read_shape(model_dir: Path, adapter_dir: Path | None = None, towers: bool = True) -> ModelShape:
    """The shape of a model directory with an adapter directory, from their JSON files alone."""
    adapter = None
    if adapter_dir is not None:
        content = _json(adapter_dir / "adapter_config.json")
        try:
            adapter = AdapterShape(int(content["r"]), int(content["num_experts"]), towers)
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{adapter_dir}: adapter_config.json names no r and num_experts") from None
    return from_config(_json(model_dir / "config.json"), model_dir.name, adapter)


def shape_info(shape: ModelShape) -> ShapeInfo:
    """What a manifest keeps of a shape beside its own fields."""
    return ShapeInfo(
        intermediate_size=shape.intermediate,
        heads=shape.heads,
        tied=shape.tied,
        vision=dict(shape.vision),
        audio=dict(shape.audio),
        tower_adapters=shape.adapter is not None and shape.adapter.towers,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise ModelError(
            f"{path}: can't be read ({reason}); give a directory in Hugging Face's layout"
        ) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


_TOWERS = {"vision": dict(_VISION, hidden_size=1280), "audio": dict(_AUDIO)}
_CRAB = AdapterShape(128, 3, False)
KNOWN = {
    "7b": ModelShape("Crab+ 7B", 3584, 18944, 28, 28, 4, 128, 152064, 32768, False, **_TOWERS, adapter=_CRAB),
    "3b": ModelShape(
        "Crab+ 3B",
        2048,
        11008,
        36,
        16,
        2,
        128,
        151936,
        32768,
        False,
        vision=dict(_TOWERS["vision"], out_hidden_size=2048),
        audio=dict(_TOWERS["audio"], output_dim=2048),
        adapter=_CRAB,
    ),
    "nano": ModelShape(
        "crab-nano",
        256,
        768,
        6,
        4,
        2,
        64,
        2048,
        8192,
        False,
        vision=dict(
            _VISION, depth=5, hidden_size=192, intermediate_size=512, num_heads=4, out_hidden_size=256
        ),
        audio=dict(
            _AUDIO,
            num_mel_bins=80,
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=1536,
            output_dim=256,
        ),
        adapter=AdapterShape(32, 3, True),
    ),
}

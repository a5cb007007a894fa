"""A model, an adapter and a bundle that are small enough for any test: random weights, all parts present.

Decoder 64 x 2 (2 heads, 1 KV head), vision 64 x 2 with an intermediate width that is no multiple of a
block, audio 48 x 2, I-LoRA of rank 32 with three experts on all of the reference's linears.
"""

from __future__ import annotations

from pathlib import Path

from tests.tiny import tiny_tokenizer

MELS = 32


def tiny_config(tokenizer_file: Path):
    """The thinker's configuration, with the tokenizer's ids."""
    from transformers import Qwen2_5OmniThinkerConfig

    from crab_edge.model import nano_config, with_tokenizer

    sizes = nano_config().to_dict()
    sizes["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    sizes["vision_config"] |= {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    }
    sizes["audio_config"] |= {
        "num_mel_bins": MELS,
        "d_model": 48,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "output_dim": 64,
    }
    return with_tokenizer(Qwen2_5OmniThinkerConfig(**sizes), tokenizer_file)


def make_tiny_model_dir(
    folder: Path, *, adapter: bool = True, towers: bool = True, seed: int = 0
) -> tuple[Path, Path | None]:
    """Write a model directory and an adapter directory under `folder`: (model, adapter or None).

    All weights are random and matter, the adapter's experts included; with `towers=False` the adapter
    covers the encoders too, but its experts there are zero, as in the official file.
    """
    import torch

    from crab_edge.features import FeatureConfig
    from crab_edge.model import ILoRAConfig, add_adapter, build, save_adapter, save_base

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(folder / "tokenizer" / "tokenizer.json")
    model = build(tiny_config(tokenizer), seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = (
                0.02
                if "norm" in name or "ln_" in name
                else 0.6 / max(1, weight.numel() // len(weight)) ** 0.5
            )
            weight += spread * torch.randn(weight.shape, generator=random)
    features = FeatureConfig(n_mels=MELS, system_prompt="You see and hear.")
    card = {"name": "crab-tiny", "labels": ["dog", "bus"], "question_templates": ["Is there a \\w+\\?"]}
    base = save_base(model, folder / "model", tokenizer, features, card)
    if not adapter:
        return base, None
    adapted = add_adapter(model, ILoRAConfig(r=32, lora_alpha=64, num_experts=3, lora_dropout=0.0), seed=seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            inside_tower = "audio_tower" in name or "visual" in name
            if ".lora_B" in name and (towers or not inside_tower):
                weight += 0.1 * torch.randn(weight.shape, generator=random)
            elif ".lora_route" in name:
                weight *= 4  # routers that decide something
    return base, save_adapter(adapted, folder / "adapter")


def make_tiny_bundle(folder: Path, *, bits: int = 4, accuracy_level: int = 0, **options) -> Path:
    """Export a tiny model with its adapter to the bundle `folder / "bundle"`, exact products by default."""
    from crab_edge_export import export_bundle

    base, adapter = make_tiny_model_dir(Path(folder) / "source")
    options = {"bits": bits, "accuracy_level": accuracy_level, **options}
    return export_bundle(base, adapter, Path(folder) / "bundle", **options)

"""Crab+ in torch: base model, I-LoRA adapter, their directories. Needs the extra `train`.

A model directory holds config.json (the thinker's), model*.safetensors, tokenizer.json, features.json,
card.json, or is Hugging Face's of Qwen2.5-Omni; an adapter directory holds PEFT's adapter_config.json and
adapter_model.safetensors (`official.py` converts Crab+'s own finetune_weights.bin).
"""

from crab_edge.ilora.torch_layer import ILoRALayer, ILoRALinear
from crab_edge.ilora.torch_tuner import ILoRAConfig, trace_routes
from crab_edge.model.adapter import (
    TARGETS,
    adapted_layers,
    adapter_config,
    add_adapter,
    load_adapter,
    save_adapter,
    target_linears,
    zero_linears,
)
from crab_edge.model.base import Card, Thinker, build, load_base, load_card, load_config, save_base
from crab_edge.model.config import nano_config, official_config, special_ids, with_tokenizer
from crab_edge.model.directory import ModelDir, open_model_dir

__all__ = [
    "TARGETS",
    "Card",
    "ILoRAConfig",
    "ILoRALayer",
    "ILoRALinear",
    "ModelDir",
    "Thinker",
    "adapted_layers",
    "adapter_config",
    "add_adapter",
    "build",
    "load_adapter",
    "load_base",
    "load_card",
    "load_config",
    "nano_config",
    "official_config",
    "open_model_dir",
    "save_adapter",
    "save_base",
    "special_ids",
    "target_linears",
    "trace_routes",
    "with_tokenizer",
    "zero_linears",
]

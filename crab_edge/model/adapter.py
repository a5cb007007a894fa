"""Putting an I-LoRA adapter on a thinker, and its directory on disk (PEFT's two files).

The linears are the reference's: every module whose name ends in one of seven suffixes, anywhere in the
thinker. That is all seven linears of a decoder layer, q, k and v of the audio tower (its output is called
out_proj) and the gated MLP of the vision tower (its attention is called q, k, v, proj).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from crab_edge.errors import ModelError
from crab_edge.ilora.torch_layer import ILoRALayer
from crab_edge.ilora.torch_register import register
from crab_edge.ilora.torch_tuner import ILoRAConfig
from crab_edge.model.base import Thinker, check_weights

register()

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = r"(.*\.)?(audio_tower|visual)\..*"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def target_linears(model: nn.Module, *, towers: bool = True) -> dict[str, tuple[int, int]]:
    """The linears that the reference adapts, adapted here or not: name -> (in, out), in the model's order."""
    out = {}
    for name, module in model.named_modules():
        name = name.removeprefix(_PREFIX)
        inside_tower = "audio_tower." in name or "visual." in name
        if (
            name.endswith(TARGETS)
            and isinstance(module, (nn.Linear, ILoRALayer))
            and (towers or not inside_tower)
        ):
            out[name] = (module.in_features, module.out_features)
    return out


def add_adapter(
    model: Thinker, config: ILoRAConfig | None = None, towers: bool = True, seed: int = 0
) -> PeftModel:
    """Wrap a thinker in a fresh adapter (exact identity) and freeze the base. `model` itself is changed.

    Train or eval mode stays what it was: call `.train()` on the result before training.
    A `config` without target_modules gets the reference's; `towers=False` leaves both encoders as they are.
    """
    _refuse_adapted(model)
    config = config or ILoRAConfig()
    if config.target_modules is None:
        config.target_modules = sorted(TARGETS)
    if not towers:
        if config.exclude_modules:
            raise ModelError("towers=False and exclude_modules both say what to leave out: give one of them")
        config.exclude_modules = TOWERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config).train(model.training)


def save_adapter(
    model: PeftModel, directory: Path | str, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors of the adapter called "default".

    `weights` are written instead of the model's own: its adapter's tensors by their names in the model.
    """
    out = Path(directory)
    # PEFT would note the path that the base was read from: a private path, of no use elsewhere.
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(out, state_dict=weights, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    return out


def load_adapter(model: Thinker, directory: Path | str, *, trainable: bool = False) -> PeftModel:
    """Wrap a thinker in a saved adapter. Its keys and shapes must fit the model exactly, else ModelError."""
    _refuse_adapted(model)
    path = Path(directory)
    config = adapter_config(path)
    expected = {}
    for name, (n_in, n_out) in _matching(model, config).items():
        key = f"{_PREFIX}{name}."
        expected[f"{key}lora_route.weight"] = (config.num_experts, n_in)
        expected[f"{key}lora_A.weight"] = (config.r, n_in)
        for i in range(config.num_experts):
            expected[f"{key}lora_B{i}.weight"] = (n_out, config.r)
    check_weights(_adapter_shapes(path), expected, path)
    return PeftModel.from_pretrained(model, str(path), is_trainable=trainable)


def adapter_config(directory: Path | str) -> ILoRAConfig:
    """The configuration of an adapter directory; ModelError unless it is an I-LoRA."""
    path = Path(directory) / "adapter_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError:
        raise ModelError(f"no adapter_config.json in {directory}: expected an adapter directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object ({error})") from None
    if kind != "ILORA":
        raise ModelError(f"{path} is of peft_type {kind!r}, expected 'ILORA'")
    return ILoRAConfig.from_pretrained(str(directory))


def adapted_layers(model: nn.Module) -> dict[str, ILoRALayer]:
    """Module name (without PEFT's prefix) -> adapted linear, in the model's order."""
    return {n.removeprefix(_PREFIX): m for n, m in model.named_modules() if isinstance(m, ILoRALayer)}


def zero_linears(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Names of adapted linears whose experts are all exactly zero: their adapter does nothing."""
    return [
        name
        for name, layer in adapted_layers(model).items()
        if adapter_name in layer.lora_A and not any(b.weight.any() for b in layer.experts(adapter_name))
    ]


def _matching(model: nn.Module, config: ILoRAConfig) -> dict[str, tuple[int, int]]:
    from peft.tuners.tuners_utils import check_target_module_exists

    if not config.target_modules:
        raise ModelError("the adapter's adapter_config.json names no target_modules")
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name) in (True,)
    }


def _adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    file = directory / WEIGHTS
    if not file.is_file():
        raise ModelError(f"no {WEIGHTS} in {directory}: expected an adapter directory")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}
    except SafetensorError as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}): copy it again") from None


def _refuse_adapted(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or adapted_layers(model):
        raise ModelError("the model already carries an adapter: give the base model, or unload() it first")

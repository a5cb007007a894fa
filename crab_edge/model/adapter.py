"""Putting an I-LoRA adapter on a thinker, and its directory on disk (PEFT's two files).

The linears are the reference's: every module whose name ends in one of seven suffixes, anywhere in the
thinker. That is all seven linears of a decoder layer, q, k and v of the audio tower (its output is called
out_proj) and the gated MLP of the vision tower (its attention is called q, k, v, proj).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from crab_edge.errors import ModelError
from crab_edge.ilora.torch_layer import ILoRALayer
from crab_edge.ilora.torch_register import register
from crab_edge.ilora.torch_tuner import ILoRAConfig
from crab_edge.model.base import Thinker
from crab_edge.model.config import describe_decoder
from crab_edge.model.weights import Shape, WeightFiles, check_finite, check_weights
from crab_edge.weight_names import DECODER, PEFT_PREFIX, canonical, transformers_name

register()

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = r"(.*\.)?(audio_tower|visual)\..*"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = PEFT_PREFIX
_LAYER = re.compile(rf"{DECODER}\.layers\.(\d+)\.")


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
    files = check_adapter_files(path, config, matching_linears(model, config))
    for name in files:
        check_finite(files.tensor(name), name, path)
    return PeftModel.from_pretrained(model, str(path), is_trainable=trainable)


def check_adapter_files(
    directory: Path, config: ILoRAConfig, linears: dict[str, tuple[int, int]]
) -> WeightFiles:
    """The tensors of an adapter directory; ModelError unless they are exactly those of `linears`.

    linears: canonical name -> (in, out), as `matching_linears` gives them.
    """
    files = WeightFiles(directory, "adapter_model")
    expected = adapter_shapes(linears, config.r, config.num_experts)
    check_decoder(files.shapes(), linears, directory)
    check_weights(
        {f"{_PREFIX}{transformers_name(n)}": shape for n, shape in files.shapes().items()},
        {f"{_PREFIX}{transformers_name(n)}": shape for n, shape in expected.items()},
        directory,
        f"it was trained on another base or isn't of r={config.r} and {config.num_experts} experts, as its "
        "adapter_config.json says",
    )
    return files


def adapter_shapes(linears: dict[str, tuple[int, int]], rank: int, experts: int) -> dict[str, Shape]:
    """Canonical tensor name -> shape of an adapter on `linears`: for each one router, A, every B."""
    shapes: dict[str, Shape] = {}
    for name, (n_in, n_out) in linears.items():
        shapes[f"{name}.lora_route.weight"] = (experts, n_in)
        shapes[f"{name}.lora_A.weight"] = (rank, n_in)
        for i in range(experts):
            shapes[f"{name}.lora_B{i}.weight"] = (n_out, rank)
    return shapes


def check_decoder(found: dict[str, Shape], linears: dict[str, tuple[int, int]], where: Path) -> None:
    """ModelError naming both sizes if an adapter's tensors were made for a decoder of other sizes."""
    theirs = decoder_size({n: s[-1] for n, s in found.items() if n.endswith(".q_proj.lora_A.weight")})
    ours = decoder_size({n: width for n, (width, _) in linears.items() if n.endswith(".q_proj")})
    if theirs and ours and theirs != ours:
        raise ModelError(
            f"{where} is an adapter for {describe_decoder(*theirs)}, but the base has "
            f"{describe_decoder(*ours)}: give the base that it was trained on"
        )


def decoder_size(inputs: dict[str, int]) -> tuple[int, int] | None:
    """(layers, width) of a decoder from canonical names of one linear a layer and its input width."""
    found = {int(m[1]): width for n, width in inputs.items() if (m := _LAYER.match(n))}
    return (max(found) + 1, next(iter(found.values()))) if found else None


def adapter_config(directory: Path | str) -> ILoRAConfig:
    """The configuration of an adapter directory; ModelError unless it is an I-LoRA."""
    path = Path(directory) / CONFIG
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError:
        raise ModelError(f"no adapter_config.json in {directory}: expected an adapter directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object ({error})") from None
    if kind != "ILORA":
        raise ModelError(f"{path} is of peft_type {kind!r}, expected 'ILORA' (an I-LoRA adapter)")
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


def matching_linears(model: nn.Module, config: ILoRAConfig) -> dict[str, tuple[int, int]]:
    """The linears that an adapter configuration names: canonical name -> (in, out), in the model's order."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not config.target_modules:
        raise ModelError("the adapter's adapter_config.json names no target_modules")
    return {
        canonical(name): (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name) in (True,)
    }


def _refuse_adapted(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or adapted_layers(model):
        raise ModelError("the model already carries an adapter: give the base model, or unload() it first")

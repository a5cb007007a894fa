"""I-LoRA as a PEFT method: its configuration, its tuner and the trace of its routers.

After `crab_edge.ilora.torch_register` was imported (importing `crab_edge.model` is enough),
`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `set_adapter` and `disable_adapter` work
as for any PEFT method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from crab_edge.errors import ModelError
from crab_edge.ilora.torch_layer import MERGE_REFUSED, ILoRALayer, ILoRALinear


@dataclass
class ILoRAConfig(PeftConfig):
    """Sizes of an I-LoRA adapter. The defaults are crab-nano's; Crab+ 7B uses r=128, lora_alpha=256.

    `target_modules` are suffixes of module names (or one regular expression matched against whole names),
    as in PEFT; `exclude_modules` takes names away again.
    """

    r: int = field(
        default=32, metadata={"help": "Rank of the shared down-projection A and of every expert B."}
    )
    lora_alpha: float = field(
        default=64, metadata={"help": "The adapter's output is scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on A's input; the router sees none."})
    num_experts: int = field(default=3, metadata={"help": "Number of experts B_i, mixed by softmax(R x)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes of the linears to adapt, or one regular expression."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes or a regular expression of names that stay as they are."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Zero experts; False draws them (for tests)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft import PeftType

        self.peft_type = PeftType.ILORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, sorted(set(value)))

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r."""
        return self.lora_alpha / self.r


class ILoRAModel(BaseTuner):
    """Puts an `ILoRALinear` around every matching `torch.nn.Linear`."""

    prefix = "lora_"
    tuner_layer_cls = ILoRALayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **unused
    ) -> None:
        sizes = {
            "r": peft_config.r,
            "lora_alpha": peft_config.lora_alpha,
            "num_experts": peft_config.num_experts,
            "lora_dropout": peft_config.lora_dropout,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, ILoRALayer):
            target.update_layer(adapter_name, **sizes)
            return
        if not isinstance(target, nn.Linear):
            raise ModelError(
                f"I-LoRA adapts torch.nn.Linear, {current_key} is a {type(target).__name__}: "
                "narrow target_modules"
            )
        layer = ILoRALinear(target, adapter_name, **sizes)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters keep the dtype of their base weights: PEFT's upcast would mix types inside one product."""

    def _check_merge_allowed(self) -> None:
        raise ModelError(MERGE_REFUSED)


@contextmanager
def trace_routes(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the routers' weights of every forward inside the `with` block.

    Yields a dictionary from module name (without PEFT's prefix) to one fp32 tensor [..., N] on the CPU per
    call.
    """
    routes: dict[str, list[torch.Tensor]] = {}
    layers = [
        (n.removeprefix("base_model.model."), m)
        for n, m in model.named_modules()
        if isinstance(m, ILoRALayer)
    ]
    for name, layer in layers:
        calls = routes.setdefault(name, [])
        layer.on_route = lambda g, calls=calls: calls.append(g.cpu())
    try:
        yield routes
    finally:
        for _, layer in layers:
            layer.on_route = None

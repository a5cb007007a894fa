"""I-LoRA around one `torch.nn.Linear`: a frozen base, one shared down-projection, N experts and a router.

    h = A dropout(x)        g = softmax(R x) in fp32        y = W x + b + s [B_0 | .. | B_{N-1}] (g outer h)

with s = alpha / r. Source: Crab+ reference (`lora_route`, `lora_A`, `lora_B{i}`); the expert sum is one
product over N*r instead of N products in sequence, which differs from the reference by rounding only.

The base may be one of bitsandbytes' quantised linears (subclasses of `torch.nn.Linear`): W x is then its own
low-bit product, and the adapter, which takes the dtype of float base weights, is float32 until it is cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from crab_edge.errors import ModelError

MERGE_REFUSED = (
    "an I-LoRA adapter can't be merged into its base weights: the router's mixture depends on the input; "
    "keep the adapter beside the base, or remove it with unload()"
)


class ILoRALayer(BaseTunerLayer):
    """What PEFT needs to know of an adapted linear: which attributes hold adapters, keyed by adapter name."""

    adapter_layer_names: tuple[str, ...] = ("lora_route", "lora_A")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "num_experts", "lora_dropout")

    def __init__(self, base_layer: nn.Linear) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_route = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        # Called with g, [..., N] fp32, at every forward of the active adapter: see
        # `torch_tuner.trace_routes`.
        self.on_route: Callable[[torch.Tensor], None] | None = None

    def update_layer(
        self,
        adapter_name: str,
        *,
        r: int,
        lora_alpha: float,
        num_experts: int,
        lora_dropout: float,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: A and R Kaiming-uniform (a = sqrt 5), every B zero, hence the identity at first."""
        if r < 1 or num_experts < 1:
            raise ModelError(
                f"I-LoRA needs r >= 1 and num_experts >= 1, got r={r}, num_experts={num_experts}"
            )
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.num_experts[adapter_name] = num_experts
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_route[adapter_name] = nn.Linear(self.in_features, num_experts, bias=False)
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        for i in range(num_experts):
            if not hasattr(self, f"lora_B{i}"):
                setattr(self, f"lora_B{i}", nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, f"lora_B{i}")
            getattr(self, f"lora_B{i}")[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        self.reset_adapter(adapter_name, zero_experts=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # New modules start in training mode: on a model in eval mode the dropout would be active.
        self.lora_dropout[adapter_name].train(self.base_layer.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_adapter(self, adapter_name: str, zero_experts: bool = True) -> None:
        """Fresh weights; `zero_experts=False` draws the B too, for tests that need a working adapter."""
        for linear in (self.lora_route[adapter_name], self.lora_A[adapter_name]):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        for linear in self.experts(adapter_name):
            if zero_experts:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def experts(self, adapter_name: str) -> list[nn.Linear]:
        """The adapter's B_0 .. B_{N-1}, each [out, r]."""
        return [getattr(self, f"lora_B{i}")[adapter_name] for i in range(self.num_experts[adapter_name])]

    def scaling(self, adapter_name: str) -> float:
        """s = alpha / r."""
        return self.lora_alpha[adapter_name] / self.r[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see the message."""
        raise ModelError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing can have been merged."""


class ILoRALinear(nn.Module, ILoRALayer):
    """An adapted linear: x [..., in] -> y [..., out] in x's dtype (or autocast's)."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **adapter: Any) -> None:
        super().__init__()
        ILoRALayer.__init__(self, base_layer)
        self.training = base_layer.training
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                y = y + self.delta(x, name).to(y.dtype)
        return y

    def delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """s [B_0|..] (g outer h): [..., in] -> [..., out]. Dropout on A's input only: the router sees x."""
        down, router = self.lora_A[adapter_name], self.lora_route[adapter_name]
        if not torch.is_autocast_enabled(x.device.type):
            # Autocast casts inside each product: an upcast here would only double what is kept for backward.
            x = self._cast_input_dtype(x, down.weight.dtype)
        h = down(self.lora_dropout[adapter_name](x))
        g = torch.softmax(router(x), dim=-1, dtype=torch.float32)
        if self.on_route is not None:
            self.on_route(g.detach())
        weights = (g * self.scaling(adapter_name)).to(h.dtype)
        z = (weights.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        return F.linear(z, torch.cat([b.weight for b in self.experts(adapter_name)], dim=1))

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: r={self.r[name]}, experts={self.num_experts[name]}, alpha={self.lora_alpha[name]}"
            for name in self.r
        )

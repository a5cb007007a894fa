"""Launches of Triton's own launcher, on CPU tensors: what it would compile for a GPU is executed as PTX."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.ptx.machine import launch
from tests.ptx.memory import Global

_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


class Launcher:
    """Takes the place of `JITFunction.run`; `launches` are the kernels' names in the order they ran."""

    def __init__(self, sm: int) -> None:
        self._target = GPUTarget("cuda", sm, 32)
        self._compiled: dict[Any, Any] = {}
        self.launches: list[str] = []

    def install(self, monkeypatch: Any) -> Launcher:
        """Until the test ends."""
        monkeypatch.setattr(
            JITFunction, "run", lambda function, *given, **options: self.run(function, *given, **options)
        )
        return self

    def run(self, function: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """One launch, specialised as by Triton: sizes of one are constants, multiples of 16 are known."""
        arguments = dict(zip(function.arg_names, given, strict=False))
        arguments |= {name: named.pop(name) for name in list(named) if name in function.arg_names}
        signature, constants, known = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = arguments[parameter.name]
            specialised = not parameter.do_not_specialize
            one = specialised and isinstance(value, int) and value == 1
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            signature[parameter.name] = _kind(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if specialised and isinstance(number, int) and number % 16 == 0:
                known[(index,)] = [["tt.divisibility", 16]]
        key = (function, str(signature), str(constants), str(known), str(named))
        if key not in self._compiled:
            source = ASTSource(function, signature, constants, known)
            self._compiled[key] = triton.compile(source, target=self._target, options=named)
        made = self._compiled[key]
        passed = [arguments[name] for name, kind in signature.items() if kind != "constexpr"]
        self._execute(made, passed, tuple(grid) + (1,) * (3 - len(grid)))
        self.launches.append(function.__name__)

    @staticmethod
    def _execute(made: Any, passed: list[Any], grid: tuple[int, ...]) -> None:
        """Tensors' storages are put into the machine's memory whole and taken back after."""
        memory, places, numbers = Global(), {}, []
        for one in passed:
            if not isinstance(one, torch.Tensor):
                numbers.append(one)
                continue
            raw = _raw(one)
            if raw.data_ptr() not in places:
                places[raw.data_ptr()] = memory.put(raw.numpy()), raw
            numbers.append(places[raw.data_ptr()][0] + one.storage_offset() * one.element_size())
        x, y, z = grid
        warps, shared = made.metadata.num_warps, made.metadata.shared
        launch(made.asm["ptx"], memory, [*numbers, 0, 0], (x, y, z), 32 * warps, shared)
        for address, raw in places.values():
            if raw.numel():
                raw.copy_(torch.from_numpy(memory.get(address, raw.numpy())))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"

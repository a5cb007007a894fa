"""The torch engine's own decoder and kernels as contenders of `bench --gpu`, on random weights.

`RandomReader` stands where the engine reads a bundle's graph, so what is timed is the engine's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from crab_edge_apps._bench_gpu_weights import GROUPS, GroupWeights, LinearWeights, RandomModel, Stored
from torch import Tensor, nn

from crab_edge.engines._torch_cache import Cache, Chunk
from crab_edge.engines._torch_decoder import ROOT, Decoder
from crab_edge.engines._torch_step import Stepper
from crab_edge.engines._torch_weights import Group, Linear, LowBit, Route, joined
from crab_edge.errors import CrabError
from crab_edge.graph_file import Node
from crab_edge.ilora import torch_ops
from crab_edge.lowbit import QTensor
from crab_edge.sizes import PLANES

_EPSILON, _THETA = 1e-6, 1e6


def on_device(stored: Stored) -> tuple[Tensor, Tensor]:
    """q and scales as `torch_ops.prepare` lays them out, without a way through the host's memory.

    Gigabytes would take minutes there. `check_layout` holds the two together.
    """
    q = torch_ops.split_halves(stored.q, stored.block) if stored.bits == 4 else stored.q
    return q.contiguous(), stored.scales.half().t().contiguous().t()


def check_layout(device: torch.device) -> None:
    """CrabError unless `on_device` gives what the kernels' own `prepare` gives."""
    generator = torch.Generator(device).manual_seed(0)
    for bits in (4, 8):
        q = torch.randint(0, 256, (6, 3, 4 * bits), dtype=torch.uint8, device=device, generator=generator)
        scales = torch.rand(6, 3, device=device, generator=generator) + 0.5
        stored = Stored(q, scales, bits, 32, (6, 96))
        host = QTensor(q.cpu().numpy(), scales.cpu().numpy(), bits, 32, (6, 96))
        right = torch_ops.prepare(host, device)
        mine = on_device(stored)
        for found, expected in zip(mine, (right.q, right.scales), strict=True):
            same = found.dtype == expected.dtype and found.stride() == expected.stride()
            if not (same and torch.equal(found, expected)):
                raise CrabError("bench --gpu lays weights out otherwise than the kernels' prepare() does")


def low_bit(stored: Stored, bias: Tensor | None = None) -> LowBit:
    """One operand of the engine's."""
    return LowBit(*on_device(stored), stored.bits, stored.block, bias)


def join(*parts: Stored) -> Stored:
    """[P_0 | P_1 | ..] along K; all but the last are whole blocks wide."""
    first = parts[0]
    return Stored(
        torch.cat([part.q for part in parts], dim=1),
        torch.cat([part.scales for part in parts], dim=1),
        first.bits,
        first.block,
        (first.shape[0], sum(part.shape[1] for part in parts)),
    )


def engine_group(model: RandomModel, weights: GroupWeights, dtype: torch.dtype) -> Group:
    """Linears of one input as the engine has them."""
    width = model.rank * model.n_experts
    linears = tuple(_linear(model, linear, i * width, dtype) for i, linear in enumerate(weights.linears))
    if weights.route is None:
        return Group(linears, None, ())
    # The stack that lies in the file is for traces of the router: none is taken here.
    stack: Any = None
    route = Route(low_bit(weights.route), model.rank, model.n_experts, len(linears), stack)
    return Group(linears, route, tuple(str(i) for i in range(len(linears))))


def _linear(model: RandomModel, weights: LinearWeights, begin: int, dtype: torch.dtype) -> Linear:
    bias = None if weights.bias is None else weights.bias.to(dtype)
    end = begin + model.rank * model.n_experts
    if model.experts is None:
        return Linear(low_bit(weights.base, bias))
    if model.experts in PLANES:
        return Linear(
            low_bit(join(weights.base, *weights.planes), bias), len(weights.planes), None, begin, end
        )
    return Linear(low_bit(weights.base, bias), 0, low_bit(weights.planes[0]), begin, end)


class RandomReader:
    """What `Decoder` asks of a `GraphReader`, answered with random weights; groups are made once and kept."""

    def __init__(self, model: RandomModel, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.device = model, dtype, model.device
        self.groups: dict[tuple[int, str], Group] = {}
        self.head_rows: int | None = None

    def __contains__(self, output: str) -> bool:
        return False

    def take(self, output: str, *kinds: str) -> Node:
        """The node that makes `output`: what the decoder reads of it."""
        shape = self.model.shape
        floats = {"epsilon": _EPSILON, "scale": shape.head_dim**-0.5}
        return Node(kinds[0], "", output, ("x", output), (output,), {}, floats)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Norms of ones, and the rotary table."""
        if name.startswith(f"{ROOT}.rotary_emb"):
            return _rotary_table(self.model.shape.head_dim, self.device)
        return torch.ones(self.model.shape.hidden, dtype=dtype or self.dtype, device=self.device)

    def group(self, outputs: Sequence[str]) -> Group:
        """The linears that make `outputs`."""
        if outputs[0] == "logits":
            return Group((Linear(low_bit(self.model.head(self.head_rows))),), None, ())
        words = outputs[0].split(".")
        key = (int(words[words.index("layers") + 1]), _GROUP_OF[words[-1].removesuffix("_proj")])
        if key not in self.groups:
            self.groups[key] = joined(engine_group(self.model, self.model.group(*key), self.dtype))
        return self.groups[key]

    def finish(self) -> None:
        """Nothing is left over: there is no graph."""


_GROUP_OF = {names[0]: group for group, names in GROUPS.items()}


class EngineDecoder:
    """The torch engine's decoder over random weights, with a cache of `slots` random tokens.

    One token goes behind any of them, a prompt into an empty cache.
    """

    def __init__(self, model: RandomModel, dtype: torch.dtype, slots: int) -> None:
        self.model = model
        self._reader = RandomReader(model, dtype)
        shape = model.shape
        # One for steps, filled, and one for prompts, which would overwrite what a step is to see.
        self._cache, self._empty = (
            Cache(shape.layers, shape.kv_heads, shape.head_dim, slots, model.device, dtype) for _ in range(2)
        )
        self._empty.reserve(slots, 0)
        self._cache.reserve(slots, 0)
        buffers = zip(self._cache.keys, self._cache.values, strict=True)
        for (keys, values), filled in zip(buffers, model.cache(slots), strict=True):
            keys[:, :slots], values[:, :slots] = filled
        self._decoders: dict[int | None, Decoder] = {}
        self.decoder(None)

    def decoder(self, head_rows: int | None) -> Decoder:
        """The decoder with a head of that many rows (None: the vocabulary); its layers are the same."""
        if head_rows not in self._decoders:
            self._reader.head_rows = head_rows
            sizes: Any = SimpleNamespace(layers=self.model.shape.layers, head_dim=self.model.shape.head_dim)
            reader: Any = self._reader
            self._decoders[head_rows] = Decoder(reader, sizes)
        return self._decoders[head_rows]

    def groups(self, name: str) -> list[Group]:
        """One group of linears of every layer."""
        return [self._reader.groups[layer, name] for layer in range(self.model.shape.layers)]

    def apply(self, group: Group, x: Tensor, compiled: bool) -> list[Tensor]:
        """One group's outputs; the engine doesn't compile."""
        return group(x)

    def runner(self, x: Tensor, past: int, rows: int | None, compiled: bool) -> Callable[[], Tensor]:
        """A function that passes x [T, hidden] behind `past` tokens and gives logits [1, vocab, or rows]."""
        decoder, shape = self.decoder(rows), self.model.shape
        tokens = len(x)
        if tokens == 1:
            step = Stepper(decoder, self._cache, shape.hidden, rows or shape.vocab, self.model.device)
            step.embeds.copy_(x)
            step.places.fill_(past)

            def run() -> Tensor:
                step.run()
                return step.logits[None]

            return run
        places = torch.arange(past, past + tokens, device=self.model.device).expand(3, tokens).contiguous()
        embeds, chunk = x.float(), Chunk(self._empty, past, tokens)
        return lambda: decoder(embeds, places, chunk)[None]

    def products(self, group: Group, x: Tensor, z: Tensor | None) -> list[Tensor]:
        """One group's outputs, its route left out: z [1, linears*experts*rank] is given."""
        return [y for linear in group.linears for y in _split(linear, linear(x, z))]

    def bytes(self, group: Any) -> int:
        """Bytes of a group of linears: codes, scales, biases."""
        total = 0 if group.route is None else _size(group.route.operand)
        for linear in group.linears:
            total += _size(linear.base) + (0 if linear.experts is None else _size(linear.experts))
        return total

    def route_bytes(self, group: Any) -> int:
        """Bytes of a group's route alone."""
        return 0 if group.route is None else _size(group.route.operand)

    def head_bytes(self) -> int:
        """Bytes of the head."""
        return _size(self._decoders[None]._head.linears[0].base)


def _size(operand: Any) -> int:
    held = (operand.q, operand.scales, operand.bias)
    return sum(tensor.nbytes for tensor in held if tensor is not None)


class KernelGroup(nn.Module):
    """A group of the engine's linears as a module, so that a layer can be compiled once for all layers.

    The tensors are the group's own: no memory is taken.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.linears = nn.ModuleList(_Product(linear) for linear in group.linears)
        self.router = None if group.route is None else _Operand(group.route.operand)
        self.sizes = (
            () if group.route is None else (group.route.rank, group.route.experts, group.route.groups)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [M, K] -> one [M, N] for each linear."""
        z = None
        if self.router is not None:
            low = self.router
            z = torch.ops.crab.ilora_route(x, low.q, low.scales, low.bits, low.block, *self.sizes)
        return [y for linear in self.linears for y in _split(linear, linear(x, z))]


def _split(linear: Any, y: Tensor) -> Sequence[Tensor]:
    """The outputs of the linears that run in one launch."""
    return y.split(list(linear.rows), dim=-1) if linear.rows else (y,)


class _Operand(nn.Module):
    def __init__(self, low: Any) -> None:
        super().__init__()
        self.register_buffer("q", low.q)
        self.register_buffer("scales", low.scales)
        self.register_buffer("bias", low.bias)
        self.bits, self.block = low.bits, low.block


class _Product(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.base = _Operand(linear.base)
        self.beside = None if linear.experts is None else _Operand(linear.experts)
        self.planes, self.begin, self.end = linear.planes, linear.begin, linear.end
        self.rows = linear.rows

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        low, beside = self.base, self.beside
        mine = None if z is None else z[:, self.begin : self.end].contiguous()
        if beside is None:
            sizes = (low.bits, low.block, self.planes, low.bias)
            rows = list(self.rows) if self.rows and mine is not None else None
            return torch.ops.crab.lowbit_linear(x, mine, low.q, low.scales, *sizes, rows)
        experts = (beside.q, beside.scales, beside.bits, beside.block)
        return torch.ops.crab.lowbit_linear_experts(
            x, mine, low.q, low.scales, low.bits, low.block, *experts, low.bias
        )


class KernelHead(nn.Module):
    """A low-bit head: [M, hidden] -> [M, vocab]."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.low = _Operand(low_bit(stored))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low
        return torch.ops.crab.lowbit_linear(x, None, low.q, low.scales, low.bits, low.block, 0, None)


def kernel_bytes(model: RandomModel) -> int:
    """Bytes of the whole decoder with its head as the kernels hold it (scales in 16 bits), by arithmetic."""
    low, shape = model.recipe, model.shape

    def stored(n: int, k: int, bits: int) -> int:
        block = low.block_of(bits)
        return n * -(-k // block) * (block * bits // 8 + 2)

    total = stored(shape.vocab, shape.hidden, low.head_bits)
    inner = model.rank * model.n_experts
    for _, n, k in shape.decoder_linears:
        layer = stored(n, k, low.bits)
        if model.experts is not None:
            layer += stored(model.rank + model.n_experts, k, low.adapter_bits)
            planes = PLANES.get(model.experts, 0)
            layer += planes * stored(n, inner, low.bits) if planes else stored(n, inner, low.adapter_bits)
        total += shape.layers * layer
    return total


def _rotary_table(depth: int, device: torch.device) -> Tensor:
    """Frequencies float32 [3, depth/2]: TMRoPE gives each of them to one of the three axes."""
    half = depth // 2
    frequencies = _THETA ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    sections = (half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8)
    axis = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(sections, device=device))
    table = torch.zeros(3, half, device=device)
    table[axis, torch.arange(half, device=device)] = frequencies.float()
    return table

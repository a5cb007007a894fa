"""The vision encoder on its only input, 224x224: a fixed 16x16 grid of patches, any number of temporal
patches.

`pixel_values` [T*256, 1176] -> `embeddings` [T*64, H]. Window permutation and rotary angles are constants,
so each of the four windows is a run of 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import ModelError

from .graph import FLOAT, MICROSOFT, GraphBuilder
from .linear import LinearWriter, Tick
from .weights import WeightStore

ROOT = "visual"
IMAGE = 224
_EPSILON = 1e-6


class Grid:
    """The fixed order of one frame's patches, from the vision config.

    patches: 256; cells: 64 groups of 2x2 patches, one token each; `order` [64]: cells in window order;
    `inverse` undoes it; `windows` in a frame. Raises ModelError where the image doesn't divide evenly.
    """

    def __init__(self, config: Any) -> None:
        patch, self.merge = config.patch_size, config.spatial_merge_size
        self.side = IMAGE // patch
        cell = patch * self.merge
        if IMAGE % cell or config.window_size % cell or IMAGE % config.window_size:
            raise ModelError(
                f"an image of {IMAGE} pixels doesn't divide into windows of {config.window_size} and patches "
                f"of {patch} x {self.merge}; only such vision encoders can be exported"
            )
        self.patches = self.side**2
        self.cell_patches = self.merge**2
        self.cells = self.patches // self.cell_patches
        self.windows = (IMAGE // config.window_size) ** 2
        span, across = config.window_size // cell, IMAGE // cell
        cells = np.arange(self.cells).reshape(across // span, span, across // span, span)
        self.order = cells.transpose(0, 2, 1, 3).reshape(-1)
        self.inverse = np.argsort(self.order)

    def angles(self, head_dim: int, theta: float) -> NDArray[np.float32]:
        """float32 [256, head_dim / 2]: a quarter of a head turns with the row, a quarter with the column.

        Rows are in the order of the windows; inside a cell patches lie 2x2.
        """
        m, n = self.merge, self.side // self.merge
        rows = np.repeat(np.arange(self.side), self.side).reshape(n, m, n, m).transpose(0, 2, 1, 3)
        columns = np.tile(np.arange(self.side), self.side).reshape(n, m, n, m).transpose(0, 2, 1, 3)
        places = np.stack([axis.reshape(self.cells, -1)[self.order].reshape(-1) for axis in (rows, columns)])
        half = head_dim // 2
        frequencies = 1.0 / theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
        turned = places[..., None].astype(np.float32) * frequencies.astype(np.float32)
        return np.concatenate(list(turned), axis=-1)


class VisionExporter:
    """Writes the vision encoder of `weights` into `graph`; `config` is the thinker's vision config."""

    def __init__(self, graph: GraphBuilder, linears: LinearWriter, weights: WeightStore, config: Any) -> None:
        if config.hidden_act != "silu":
            raise ModelError(f"the vision activation is {config.hidden_act!r}; only 'silu' can be exported")
        self.graph = graph
        self.linears = linears
        self.weights = weights
        self.config = config
        self.grid = Grid(config)

    def write(self, tick: Tick = lambda: None) -> None:
        """All nodes, input and output. The rows of a frame stay [T, 256, width] all the way."""
        for _, make in self.units():
            make()
            tick()

    def units(self) -> list[tuple[str, Callable[[], None]]]:
        """The graph in steps; see `DecoderExporter.units`."""
        blocks = [(f"block {i}", partial(self._block, i)) for i in range(self.config.depth)]
        return [("start", self._start), *blocks, ("merger", self._merger)]

    def _start(self) -> None:
        graph, config, grid = self.graph, self.config, self.grid
        width, unit = config.hidden_size, grid.cell_patches
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        graph.input("pixel_values", FLOAT, ["patches", pixels])
        graph.output("embeddings", FLOAT, ["tokens", config.out_hidden_size])
        self._rotary()
        x = graph.reshape("pixel_values", [-1, grid.patches, pixels], f"{ROOT}.frames")
        x = self._linear(x, "patch_embed.proj")
        x = graph.reshape(x, [0, grid.cells, unit * width], f"{ROOT}.cells")
        x = graph.node("Gather", [x, graph.constant(grid.order)], f"{ROOT}.window_order", axis=1)
        graph.reshape(x, [0, grid.patches, width], self.carried(0))

    def carried(self, i: int) -> str:
        """What block i reads: the rows [T, 256, width] that the blocks before it left."""
        return f"{ROOT}.blocks.{i - 1}.mlp.residual" if i else f"{ROOT}.windows"

    def _merger(self) -> None:
        graph, config, grid = self.graph, self.config, self.grid
        x = self._norm(self.carried(config.depth), "merger.ln_q")
        x = graph.reshape(x, [0, grid.cells, grid.cell_patches * config.hidden_size], f"{ROOT}.merger.cells")
        x = self._linear(x, "merger.mlp.0")
        x = graph.node("Gelu", [x], f"{ROOT}.merger.mlp.1")
        x = self._linear(x, "merger.mlp.2")
        x = graph.node("Gather", [x, graph.constant(grid.inverse)], f"{ROOT}.raster_order", axis=1)
        graph.reshape(x, [-1, config.out_hidden_size], "embeddings")

    def _rotary(self) -> None:
        parameters = self.config.rope_parameters or {}
        theta = float(parameters.get("rope_theta", 10000.0))
        angles = self.grid.angles(self.config.hidden_size // self.config.num_heads, theta)
        self.graph.weight(f"{ROOT}.rotary_pos_emb.cos", np.cos(angles))
        self.graph.weight(f"{ROOT}.rotary_pos_emb.sin", np.sin(angles))

    def _block(self, i: int) -> None:
        graph, path, x = self.graph, f"blocks.{i}", self.carried(i)
        normed = self._norm(x, f"{path}.norm1")
        mixed = self._attention(i, f"{path}.attn", normed)
        x = graph.node("Add", [x, mixed], f"{ROOT}.{path}.attn.residual")
        normed = self._norm(x, f"{path}.norm2")
        names = [f"{ROOT}.{path}.mlp.{part}_proj" for part in ("gate", "up")]
        self.linears.group(
            f"{ROOT}.{path}.mlp.gate_up", normed, [self.weights.linear(n) for n in names], names
        )
        act = graph.node("QuickGelu", [names[0]], f"{ROOT}.{path}.mlp.act_fn", domain=MICROSOFT, alpha=1.0)
        product = graph.node("Mul", [act, names[1]], f"{ROOT}.{path}.mlp.product")
        down = self._linear(product, f"{path}.mlp.down_proj")
        graph.node("Add", [x, down], f"{ROOT}.{path}.mlp.residual")

    def _attention(self, i: int, path: str, x: str) -> str:
        """Attention inside each window, or inside the frame for the blocks that say so."""
        graph, config, grid, full = self.graph, self.config, self.grid, f"{ROOT}.{path}"
        names = [f"{full}.{part}" for part in "qkv"]
        self.linears.group(f"{full}.qkv", x, [self.weights.linear(name) for name in names], names)
        q, k, v = (self._rotate(names[0]), self._rotate(names[1]), names[2])
        whole = i in config.fullatt_block_indexes
        rows = grid.patches if whole else grid.patches // grid.windows
        if not whole:
            q, k, v = (graph.reshape(n, [-1, rows, config.hidden_size], f"{n}.windows") for n in (q, k, v))
        mixed = graph.node(
            "MultiHeadAttention",
            [q, k, v],
            f"{full}.attention",
            domain=MICROSOFT,
            num_heads=config.num_heads,
            scale=(config.hidden_size // config.num_heads) ** -0.5,
        )
        if not whole:
            mixed = graph.reshape(mixed, [-1, grid.patches, config.hidden_size], f"{full}.attention.frames")
        return self._linear(mixed, f"{path}.proj")

    def _rotate(self, x: str) -> str:
        prefix = f"{ROOT}.rotary_pos_emb"
        inputs = [x, self.graph.constant([0]), f"{prefix}.cos", f"{prefix}.sin"]
        return self.graph.node(
            "RotaryEmbedding", inputs, f"{x}.rotated", domain=MICROSOFT, num_heads=self.config.num_heads
        )

    def _linear(self, x: str, path: str) -> str:
        name = f"{ROOT}.{path}"
        return self.linears.single(x, self.weights.linear(name), name)

    def _norm(self, x: str, path: str) -> str:
        name = f"{ROOT}.{path}"
        weight = self.graph.weight(f"{name}.weight", self.weights.array(f"{name}.weight"))
        return self.graph.node("SimplifiedLayerNormalization", [x, weight], name, axis=-1, epsilon=_EPSILON)

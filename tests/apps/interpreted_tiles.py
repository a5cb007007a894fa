"""Searches tiles for a tiny decoder with the kernels in Triton's interpreter (run by test_bench_gpu_tiles).

A program of its own, because TRITON_INTERPRET counts when Triton is imported.
"""

import dataclasses
import json

import torch
from crab_edge_apps import _bench_gpu_tiles as tiles
from crab_edge_apps._bench_gpu_card import open_card
from crab_edge_apps._bench_gpu_weights import random_model

from crab_edge.ilora import triton_launch, triton_tiles
from crab_edge.shape import KNOWN, AdapterShape

SMALL = dataclasses.replace(
    KNOWN["nano"], hidden=64, intermediate=96, layers=1, heads=2, kv_heads=1, head_dim=32, vocab=80,
    adapter=AdapterShape(32, 3),
)  # fmt: skip

# On a CPU the operators compute without kernels; here they are to launch them.
torch.ops.crab.lowbit_linear = triton_launch.linear
torch.ops.crab.ilora_route = triton_launch.route

# Warps and stages are nothing to the interpreter.
tiles.PROPERTIES = ("rows", "chunks")
card = open_card("cpu")
model = random_model(SMALL, "residual4x2", card.device)
before = triton_tiles.linear_tile, triton_tiles.route_tile
parts = tiles.sweep(model, card, 1, ("qkv route", "down product"))
assert (triton_tiles.linear_tile, triton_tiles.route_tile) == before
assert [part["part"] for part in parts] == ["qkv route", "down product"]
for part in parts:
    assert part["failed"] == {}, part["failed"]
    tried = [tuple(one["tile"].values()) for one in part["tried"]]
    assert (
        len(set(tried)) > 6
        and tuple(part["chosen"].values()) in tried
        and tuple(part["best"].values()) in tried
    )
    assert all(one["seconds"] > 0 for one in part["tried"])

# A tile whose answer is another one is found out, not timed.
tiles.variants = lambda tile, *_: [dataclasses.replace(tile, down=3)] if tile.down else []


def wrong_for_three(x, *weight):
    scale = 1.5 if triton_tiles.route_tile(1, 64, 8, 32, 32, 3, 3).down == 3 else 1.0
    return triton_launch.route(x, *weight) * scale


torch.ops.crab.ilora_route = wrong_for_three
(wrong,) = tiles.sweep(model, card, 1, ("qkv route",))
assert any("relative error" in why for why in wrong["failed"].values()), wrong["failed"]
assert wrong["best"] == wrong["chosen"]

result = {"card": {"name": "none"}, "copy_gigabytes_per_s": 1.0}
result["shapes"] = [{"shape": "nano", "form": "residual4x2", "block": 32, "parts": [*parts, wrong]}]
tiles.show(json.loads(json.dumps(result)))

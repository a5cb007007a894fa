"""`bench --gpu --tiles`: other tiles for the decode kernels, each checked and timed beside the one in use.

`crab_edge.ilora.triton_tiles` chooses by shape alone; its numbers were derived and have to be confirmed on a
card. Every part starts from its tile and keeps the best along one property after the other, all contenders of
a comparison taking turns. What is found is printed, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from crab_edge_apps import _bench_gpu_bars as judging
from crab_edge_apps import _bench_gpu_timing as timing
from crab_edge_apps._bench_gpu_card import Card
from crab_edge_apps._bench_gpu_contenders import reason, release, worst
from crab_edge_apps._bench_gpu_kernels import EngineDecoder
from crab_edge_apps._bench_gpu_parts import Inputs, Part, kernel_parts
from crab_edge_apps._bench_gpu_weights import GROUPS, RandomModel

from crab_edge.ilora import triton_tiles
from crab_edge.ilora.triton_tiles import Tile

PROPERTIES = ("rows", "chunks", "warps", "stages")
Progress = Callable[[str, int, int], None]


def variants(tile: Tile, name: str, operands: Sequence[tuple[int, int]], experts: int) -> Iterator[Tile]:
    """Tiles that differ from `tile` in the property `name`; stages and warps follow where there is less room.

    operands: bits and block of each weight that is read; experts: of a router, whose rows a route's tile
    holds besides `tile.down` rows of A; 0 for products.
    """
    values = {
        "rows": (16, 32, 64, 128),
        "chunks": (1, 2, 4, 8, 16),
        "warps": (1, 2, 4, 8),
        "stages": range(2, 6),
    }
    for value in values[name]:
        made = [replace(tile, **{name: value})]
        if name == "rows":
            # As many chunks as before, and as many as make a stage as large as before.
            downs = [down for down in (4, 8, value - experts) if down + experts <= value] if experts else [0]
            chunks = (tile.chunks, max(1, min(16, tile.chunks * tile.rows // value)))
            made = [replace(tile, rows=value, down=d, chunks=c) for d in downs for c in chunks]
        for one in dict.fromkeys(_fitted(tile, operands) for tile in made):
            if one is not None and one != tile:
                yield one


def _fitted(tile: Tile, operands: Sequence[tuple[int, int]]) -> Tile | None:
    """The tile with as many stages and warps as it has room and work for; None without room for two."""
    stage = max(triton_tiles.stage_bytes(tile.rows, tile.columns, *operand) for operand in operands)
    stages = min(tile.stages, 1 + triton_tiles.SHARED // (stage * tile.chunks))
    # A tensor core's tile has 16 rows; a warp with less than one to itself would repeat another's.
    warps = min(tile.warps, tile.chunks * tile.rows // 16)
    return replace(tile, stages=stages, warps=warps) if stages >= 2 else None


def sweep(
    model: RandomModel,
    card: Card,
    rounds: int,
    parts: tuple[str, ...] = (),
    progress: Progress = lambda what, done, of: None,
) -> list[dict[str, Any]]:
    """For every product and route of a decode step: all tiles that were tried, the best one last chosen.

    parts: some of "qkv product", "qkv route", ..; default all. Times are seconds of one launch, medians of
    `rounds` rounds; `failed` has the tiles that don't compile, don't launch or give another answer, and a
    part that fails as a whole has its `error`. `in_cache`: the part may stay in the L2 between two launches.
    """
    inputs = Inputs(model, torch.bfloat16, 1, 1)
    decoder = EngineDecoder(model, torch.bfloat16, 2)
    found = []
    with torch.inference_mode():
        wanted = [part for part in kernel_parts(decoder, model, inputs) if not parts or part.name in parts]
        for number, part in enumerate(wanted):
            progress(part.name, number, len(wanted))
            try:
                row = _one(part, model, decoder, inputs, card, rounds)
            except Exception as problem:  # what other parts have given is worth its minutes
                row = {"error": reason(problem), "chosen": None, "best": None, "tried": [], "failed": {}}
            in_cache = card.may_cache(part.bytes * part.per)
            found.append({"part": part.name, "bytes": part.bytes, "in_cache": in_cache} | row)
            release(card)
    return found


def _one(
    part: Part, model: RandomModel, decoder: EngineDecoder, inputs: Inputs, card: Card, rounds: int
) -> dict[str, Any]:
    group, _, kind = part.name.rpartition(" ")
    route, weights = kind == "route", decoder.groups(group)[0]
    read = [weights.route.operand] if route else [weights.linears[0].base, weights.linears[0].experts]
    operands = [(one.bits, one.block) for one in read if one is not None]
    chosen = _chosen(part, route)
    best, failed = chosen, {}
    tried: list[dict[str, Any]] = []
    for name in PROPERTIES:
        field = dict.fromkeys(
            [chosen, best, *variants(best, name, operands, model.n_experts if route else 0)]
        )
        timed = {}
        for tile in field:
            try:
                with _choosing(route, lambda _, tile=tile: tile):
                    run = timing.graphed(part.run, card)
                    outputs = [y.float() for y in run()]
                error = worst(outputs, inputs.answers(model, part.name, part.expected))
                if error > part.tolerance:
                    raise ArithmeticError(f"relative error {error:.2g}")
                timed[tile] = timing.Timed(described(tile), run if card.real else _within(run, tile, route))
            except torch.OutOfMemoryError:
                failed[described(tile)] = "ran out of memory"
                release(card)
            except Exception as problem:
                failed[described(tile)] = reason(problem)
        if not timed:
            break
        timing.measure(list(timed.values()), rounds, card)
        for tile, one in timed.items():
            tried.append({"by": name, "tile": asdict(tile), "seconds": one.median / part.per})
        best = min(timed.items(), key=lambda item: item[1].median)[0]
        timed.clear()
        release(card)
    return {
        "linears": list(GROUPS[group]),
        "chosen": asdict(chosen),
        "best": asdict(best),
        "tried": tried,
        "failed": failed,
    }


def _chosen(part: Part, route: bool) -> Tile:
    """The tile that the kernel takes by itself."""
    seen: list[Tile] = []
    with _choosing(route, lambda tile: seen.append(tile) or tile):
        part.run()
    return seen[0]


def _within(run: Callable[[], Any], tile: Tile, route: bool) -> Callable[[], Any]:
    """Without a graph every call chooses anew."""

    def forced_run() -> Any:
        with _choosing(route, lambda _: tile):
            return run()

    return forced_run


@contextmanager
def _choosing(route: bool, choose: Callable[[Tile], Tile]) -> Iterator[None]:
    """Launches of the one kind of kernel take what `choose` makes of their own tile."""
    name = "route_tile" if route else "linear_tile"
    own = getattr(triton_tiles, name)
    setattr(triton_tiles, name, lambda *args, **more: choose(own(*args, **more)))
    try:
        yield
    finally:
        setattr(triton_tiles, name, own)


def described(tile: Tile) -> str:
    """For tables: "32 rows, 4 chunks, 4 warps, 5 stages"; of a route the rows of A too."""
    down = f" ({tile.down} of A)" if tile.down else ""
    return f"{tile.rows} rows{down}, {tile.chunks} chunks, {tile.warps} warps, {tile.stages} stages"


def show(result: dict[str, Any]) -> None:
    """A line a part: the tile in use, the best one, and what it would gain."""
    from rich.table import Table

    console = judging.console()
    copy = result["copy_gigabytes_per_s"]
    console.print(f"{result['card']['name']}: copy {copy:.0f} GB/s")
    for shape in result["shapes"]:
        table = Table(title=f"tiles of {shape['shape']}, {shape['form']}, one token")
        for column in (
            "",
            "tile in use",
            "us",
            "of copy",
            "best tile tried",
            "us",
            "of copy",
            "gain",
            "failed",
        ):
            table.add_column(column, justify="left" if "tile" in column or not column else "right")
        for row in shape["parts"]:
            cells, seconds = [row["part"] + " *" * row["in_cache"]], []
            for which in ("chosen", "best"):
                # Of the last comparison, in which both took part.
                own = [one["seconds"] for one in row["tried"] if one["tile"] == row[which]][-1:]
                seconds += own
                share = [f"{100 * row['bytes'] / one / 1e9 / copy:.0f} %" for one in own]
                tile = row[which] and described(Tile(**row[which]))
                cells += [tile or "none", *([f"{own[0] * 1e6:.2f}", *share] if own else ["", ""])]
            cells += [
                f"{seconds[0] / seconds[1]:.2f}x" if len(seconds) == 2 else "",
                str(len(row["failed"]) or ""),
            ]
            table.add_row(*cells)
        console.print(table)
        if any(row["in_cache"] for row in shape["parts"]):
            console.print(
                "*: under twice the L2 over all layers, so partly read from it; a step reads memory"
            )
        for row in shape["parts"]:
            if "error" in row:
                console.print(f"{row['part']}: {row['error']}")
            for tile, why in row["failed"].items():
                console.print(f"{row['part']}: {tile}: {why}")

"""The search for better tiles, its kernels in Triton's interpreter; no figure is looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from crab_edge_apps import _bench_gpu_tiles as tiles

from crab_edge.ilora import triton_tiles


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
def test_every_variant_fits_a_program(bits, block):
    for tile, experts in (
        (triton_tiles.linear_tile(1, 3584, 3584 + 768, bits, block), 0),
        (triton_tiles.linear_tile(1, 37888, 3584 + 768, bits, block, (18944,)), 0),
        (triton_tiles.route_tile(1, 3584, bits, block, 128, 3, 3), 3),
    ):
        for name in tiles.PROPERTIES:
            found = list(tiles.variants(tile, name, [(bits, block)], experts))
            assert tile not in found and len(set(found)) == len(found)
            assert found or name in ("stages", "chunks"), name
            for one in found:
                buffers = triton_tiles.stage_bytes(one.rows, 1, bits, block) * one.chunks * (one.stages - 1)
                assert buffers <= triton_tiles.SHARED and one.warps * 16 <= max(16, one.chunks * one.rows)
                assert one.columns == tile.columns and one.chunk == tile.chunk
                assert one.down + experts <= one.rows if experts else one.down == 0


def test_every_tile_gives_the_same_answer():
    program = Path(__file__).with_name("interpreted_tiles.py")
    run = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_a_cpu_launches_no_kernel(cli):
    ran = cli("bench", "--gpu", "--tiles", "--device", "cpu", "--shape", "nano")
    assert ran.code == 2 and "--tiles needs a GPU" in ran.err
    assert "--tiles goes with --gpu" in cli("bench", "--tiles").err
    assert "--tiles takes --shape" in cli("bench", "--gpu", "--tiles", "--check").err
    assert "--tiles takes --shape" in cli("bench", "--gpu", "--tiles", "--context", "9").err

"""Kernels compiled ahead of time, for every architecture, without a GPU."""

import re

import pytest

pytest.importorskip("triton")

from crab_edge.errors import CrabError, InputError
from crab_edge.ilora import triton_compile, triton_tiles

FOLDED = {"k2": 384, "planes": 2}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """What was compiled earlier must not pass for what compiles now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("sm", sorted(triton_compile.ARCHITECTURES))
def test_decode_product_compiles_for(sm):
    constants = triton_compile.linear_constants(1, 3584, 3584, 4, 128, **FOLDED)
    made = triton_compile.compile_kernel("linear", sm, constants=constants, dtype="float16")
    assert made.parameters == ("x", "z", "q", "s", "M", "y")
    assert re.search(rf"^\.target sm_{sm}", made.ptx, re.MULTILINE)
    version = triton_compile.ARCHITECTURES[sm]
    assert f".version {version // 10}.{version % 10}" in made.ptx
    assert re.findall(r"\.entry (\w+)", made.ptx) == [made.entry]
    assert made.cubin.startswith(b"\x7fELF")
    # What makes it fast: asynchronous copies, tensor cores, no conversion of integers, no detour of unpacked
    # weights through shared memory (16-bit stores there only for the result).
    assert "cp.async" in made.ptx and "mma.sync.aligned.m16n8k16" in made.ptx
    assert not re.search(r"cvt\.rn\.f(16|32)\.[us]", made.ptx)
    assert "atom." not in made.ptx
    assert made.grid(3) == (3, 224, 1) and made.threads == 32 * made.num_warps
    assert made.shared <= triton_tiles.SHARED


@pytest.mark.parametrize(
    ("name", "constants", "options", "parameters"),
    (
        (
            "linear",
            triton_compile.linear_constants(64, 1280, 3420, 8, 128),
            {"bias": True},
            ("x", "q", "s", "bias", "M", "y"),
        ),
        (
            "linear",
            triton_compile.linear_constants(1, 3584, 3584, 4, 128, k2=384, beside=(8, 128)),
            {"scales_beside": "float32"},
            ("x", "z", "q", "s", "qe", "se", "M", "y"),
        ),
        (
            "experts",
            triton_compile.experts_constants(8, 3584, 384, 8, 32),
            {},
            ("y0", "z", "q", "s", "M", "y"),
        ),
        (
            "route",
            triton_compile.route_constants(1, 3584, 8, 128, rank=128, experts=3, groups=3),
            {},
            ("x", "q", "s", "M", "z"),
        ),
    ),
    ids=("prefill", "beside", "experts", "route"),
)
def test_kernel_compiles_in_bfloat16(name, constants, options, parameters):
    made = triton_compile.compile_kernel(name, 87, constants=constants, dtype="bfloat16", **options)
    assert made.parameters == parameters and made.hidden_parameters == 2
    assert "mma.sync" in made.ptx and "bf16" in made.ptx


def test_ptx_version_is_the_callers_where_the_card_allows():
    constants = triton_compile.experts_constants(1, 64, 64, 8, 64)
    made = triton_compile.compile_kernel("experts", 89, constants=constants, dtype="float16", ptx_version=87)
    assert ".version 8.7" in made.ptx


@pytest.mark.parametrize(
    ("name", "sm", "dtype"), (("lin", 87, "float16"), ("linear", 75, "float16"), ("linear", 87, "float32"))
)
def test_what_does_not_exist_is_refused(name, sm, dtype):
    with pytest.raises(InputError, match=f"{name}'" if name == "lin" else "sm_75" if sm == 75 else "float32"):
        triton_compile.compile_kernel(name, sm, constants={}, dtype=dtype)


def test_a_kernel_that_reads_hidden_parameters_is_refused():
    head = ".param .u64 .ptr .global .align 1 k_param_{0},\n"
    text = "".join(head.format(i) for i in range(4)) + "ld.param.b64 \t%rd1, [k_param_{0}];"
    triton_compile._check_hidden(text.format(1), 2)
    with pytest.raises(CrabError, match="k_param_2"):
        triton_compile._check_hidden(text.format(2), 2)
    with pytest.raises(CrabError, match="4 parameters, expected 1"):
        triton_compile._check_hidden(text.format(0), 1)


@pytest.mark.parametrize("m", (1, 2, 8, 9, 33, 650))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("block", (16, 32, 64, 128, 256))
def test_tiles_fit_every_card(m, bits, block):
    for n, k in ((37888, 4352), (3584, 19712), (1280, 3420), (96, 288)):
        for tile in (
            triton_tiles.linear_tile(m, n, k, bits, block),
            triton_tiles.route_tile(m, k, bits, block, 128, 3, 2),
        ):
            stage = triton_tiles.stage_bytes(tile.rows, tile.columns, bits, block) * tile.chunks
            assert stage * (tile.stages - 1) <= triton_tiles.SHARED
            assert tile.warps * 16 <= tile.chunks * tile.rows and tile.warps in (1, 2, 4, 8)
            assert tile.chunk * 8 // bits <= block and (block * bits // 8) % tile.chunk == 0
        assert tile.down + 3 <= tile.rows


def test_stacked_linears_begin_at_a_tile():
    for splits in ((3584, 4096), (18944,), (2048, 2304), (16, 48)):
        tile = triton_tiles.linear_tile(1, 37888, 4352, 4, 128, splits)
        assert not any(split % tile.rows for split in splits)
    with pytest.raises(CrabError, match="multiples of 16"):
        triton_tiles.linear_tile(1, 64, 4352, 4, 128, (24,))


def test_an_older_ptxas_is_named(monkeypatch):
    import triton
    from triton.runtime.errors import PTXASError

    def refuse(*_, **__):
        print("a whole listing of the PTX")
        raise PTXASError("stderr:\nptxas fatal   : Value 'sm_110a' is not defined for option 'gpu-name'\n")

    monkeypatch.setattr(triton, "compile", refuse)
    constants = triton_compile.experts_constants(1, 64, 64, 8, 32)
    with pytest.raises(
        CrabError, match=r"sm_110 \(ptxas fatal : Value 'sm_110a'.*install -U torch triton"
    ) as caught:
        triton_compile.compile_kernel("experts", 110, constants=constants, dtype="float16")
    assert "\n" not in str(caught.value)

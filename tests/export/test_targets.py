"""The table of targets: who owns which product, what is refused and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from crab_edge_export.targets import TARGETS, check, memory_estimate, partial_blocks, target

from crab_edge.errors import InputError
from crab_edge.shape import KNOWN
from crab_edge.sizes import WeightRecipe, recipe_for

SEVEN = KNOWN["7b"]
W4 = recipe_for(SEVEN)
WIDE = recipe_for(SEVEN, block=128)


def test_the_issue_s_targets_are_there():
    assert target("rtx").sm == (86, 89, 120) and target("rtx").kind == "rtx"
    assert target("jetson-orin").sm == (87,) and target("jetson-orin").int4_route == "plugin"
    assert target("jetson-thor").sm == (110,)
    assert target("cuda-sm90").sm == (90,) and target("cuda-sm90").plugins
    assert target("rtx-sm121").sm == (121,)
    for name in TARGETS:
        assert target(name).name == name


@pytest.mark.parametrize("name", ["orin", "cuda-sm88", "rtx-sm87", "cuda-sm101", "", "cuda-sm90a"])
def test_an_unknown_target_is_refused_with_the_names(name):
    with pytest.raises(InputError, match=r"jetson-orin.*cuda-smNN"):
        target(name)


def test_routes():
    """The plugin has 4-bit products on Orin, and elsewhere where the library doesn't take the block."""
    orin, thor, rtx = target("jetson-orin"), target("jetson-thor"), target("rtx")
    assert orin.route(4, 128) == "plugin" and orin.route(4, 128, "dequantize") == "dequantize"
    assert thor.route(4, 128) == "dequantize" and thor.route(4, 32) == "plugin"
    assert thor.route(8, 128) == "plugin"
    assert rtx.route(4, 32) == rtx.route(8, 128) == "dequantize"


@pytest.mark.parametrize(
    "name",
    ["rtx", "jetson-orin", "jetson-thor", "cuda-sm80", "cuda-sm86", "cuda-sm90", "cuda-sm100", "cuda-sm121"],
)
@pytest.mark.parametrize("size", ["7b", "3b"])
def test_the_default_recipe_suits_every_target(name, size):
    shape = KNOWN[size]
    check(target(name), recipe_for(shape), shape)


def test_refusals_name_what_is_wrong_and_the_way_out():
    with pytest.raises(InputError, match=r"4-bit weights need sm_80, the target has sm_75.*--bits 8"):
        check(target("cuda-sm75"), W4, SEVEN)
    with pytest.raises(InputError, match=r"cache of type fp8 need sm_89, the target has sm_86.*choose fp16"):
        check(target("rtx"), W4, SEVEN, kv="fp8")
    check(target("rtx-sm89"), W4, SEVEN, kv="fp8")
    with pytest.raises(InputError, match=r"activations of type fp4: expected"):
        check(target("rtx-sm120"), W4, SEVEN, compute="fp4")
    with pytest.raises(InputError, match=r"blocks of 32: tensorrt takes 64, 128.*--int4 dequantize out"):
        check(target("jetson-orin"), W4, SEVEN, int4="dequantize")
    check(target("jetson-orin"), WIDE, SEVEN, int4="dequantize")
    with pytest.raises(InputError, match=r"no kernel for sm_75, only for 80, 86.*--engine onnxruntime"):
        check(target("cuda-sm75"), recipe_for(SEVEN, bits=8), SEVEN)
    with pytest.raises(InputError, match=r"no plugins"):
        check(target("rtx"), W4, SEVEN, int4="plugin")
    with pytest.raises(InputError, match=r"blocks of 256: tensorrt_rtx takes.*--block 128"):
        check(target("rtx"), WeightRecipe(block=256, block8=128), SEVEN)


def test_partial_blocks_of_the_decoder_are_refused_and_named():
    odd = replace(SEVEN, intermediate=18_940)
    with pytest.raises(InputError, match=r"partial blocks in down \(K=18940, block 32\)"):
        check(target("rtx"), W4, odd)
    names = {name for name, _, _ in partial_blocks(SEVEN, W4)}
    # 3420 in blocks of 128 and 1176 pixels: encoders', which the exporter fills up.
    assert names == {"vision.mlp.down", "vision.patch_embed"}


def test_all_problems_come_at_once():
    with pytest.raises(InputError) as caught:
        check(target("cuda-sm75"), W4, replace(SEVEN, hidden=3590), compute="bf16", kv="fp8")
    text = str(caught.value)
    for part in ("bf16 need sm_80", "fp8 need sm_89", "4-bit weights need sm_80", "partial blocks in q "):
        assert part in text
    assert "\n" not in text


def test_float_recipes_suit_everything():
    check(target("cuda-sm75"), recipe_for(SEVEN, bits=32), replace(SEVEN, hidden=3590))


def test_estimates_follow_the_bytes():
    small = memory_estimate(target("rtx"), W4, SEVEN, cache=1024)
    large = memory_estimate(target("rtx"), W4, SEVEN, cache=8192)
    kv = 2 * 28 * 4 * 128 * 2
    assert large.run - small.run == (8192 - 1024) * (kv + 28 * 512 * 2)
    assert small.engines == large.engines
    # 4-bit weights of 7.6 billion parameters with planes: between 4.5 and 7 bits each, scales included.
    assert 4.3e9 < small.engines < 7.5e9
    assert small.build > small.engines and len(small.lines()) == 3
    assert (
        memory_estimate(target("cuda-sm90"), W4, SEVEN).build
        > memory_estimate(target("rtx"), W4, SEVEN).build
    )

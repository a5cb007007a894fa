"""Planning: tokens, windows, what fits, and the nearest plan."""

from dataclasses import replace

import pytest

from crab_edge.errors import InputError
from crab_edge.plan import Wish, nearest, plan, prefill_chunk
from crab_edge.shape import KNOWN
from crab_edge.sizes import recipe_for

GB = 1_000_000_000
SEVEN = KNOWN["7b"]
RECIPE = recipe_for(SEVEN, 4, 128)


def wish(**changes):
    return replace(Wish(10, 10, 10, 64 * GB, kv_dtype="float16"), **changes)


def test_a_minute_in_one_window():
    found = plan(SEVEN, RECIPE, wish(seconds=60, frames=60, window_s=60))
    assert (found.tokens["video"], found.tokens["audio"]) == (1920, 1500)
    assert found.wish.windows == 1


@pytest.mark.parametrize(
    ("seconds", "windows", "longest"),
    [(4, 1, 4), (10, 1, 10), (10.9, 1, 10.9), (11.5, 2, 10), (60.5, 6, 10.5)],
)
def test_windows_are_those_that_a_clip_is_cut_into(seconds, windows, longest):
    import crab_edge.clip as module

    assert (wish(seconds=seconds).windows, wish(seconds=seconds).shown_s) == (windows, pytest.approx(longest))

    class Cut:
        duration_s = seconds

    assert len(module.Clip.windows(Cut(), 10.0)) == windows


def test_promised_peaks_of_the_7b_model():
    """On CPU: a bundle and 2 GB for a clip of 10 s, a bundle and 3 GB for 60 s; the parts add up."""
    ten = plan(SEVEN, RECIPE, wish())
    assert ten.disk < ten.peak < ten.disk + 2 * GB
    minute = plan(SEVEN, RECIPE, wish(seconds=60, frames=60, window_s=60))
    assert ten.peak < minute.peak < minute.disk + 3 * GB
    closed = plan(SEVEN, RECIPE, wish(low_memory=True))
    towers = ten.memory["vision"] + ten.memory["audio"]
    assert towers <= ten.peak - closed.peak < towers + 0.1 * GB
    assert plan(SEVEN, RECIPE, wish(kv_dtype="float32")).memory["cache"] == 2 * ten.memory["cache"]


def test_the_cache_is_exact():
    found = plan(SEVEN, RECIPE, wish())
    assert found.memory["cache"] == 2 * 28 * 4 * 128 * found.tokens["total"] * 2


def test_the_nearest_plan_changes_as_little_as_it_can():
    large = wish(seconds=60, frames=60, window_s=60, kv_dtype="float32")
    peak = plan(SEVEN, RECIPE, large).peak
    assert nearest(SEVEN, RECIPE, replace(large, device_bytes=peak))[1] == []
    found, changes = nearest(SEVEN, RECIPE, replace(large, device_bytes=peak - 1))
    assert changes == ["encoders closed before the decoder opens"] and found.fits
    narrow = recipe_for(SEVEN, 4, 32)
    short = plan(SEVEN, RECIPE, wish(low_memory=True)).peak
    found, changes = nearest(SEVEN, narrow, replace(large, device_bytes=short))
    assert found.fits and "block 128" in changes and "windows of 10 s with 10 frames" in changes
    assert found.wish.window_s == 10 and found.wish.frames == 10
    found, changes = nearest(SEVEN, narrow, replace(large, device_bytes=short - 30_000_000))
    assert found.fits and found.wish.frames < 10
    assert nearest(SEVEN, narrow, replace(large, device_bytes=4 * GB)) is None


def test_a_bundle_keeps_its_recipe():
    large = wish(kv_dtype="float32", device_bytes=6 * GB)
    narrow = recipe_for(SEVEN, 4, 32)
    assert nearest(SEVEN, narrow, large) is not None or plan(SEVEN, narrow, large).peak > 6 * GB
    fixed = nearest(SEVEN, narrow, replace(large, device_bytes=64 * GB), fixed=True)
    assert fixed[0].recipe == narrow and fixed[0].wish.kv_dtype == "float32"
    assert nearest(SEVEN, narrow, large, fixed=True) is None


def test_positions_bound_a_plan_too():
    nano = KNOWN["nano"]
    found = plan(nano, recipe_for(nano), wish(seconds=600, frames=20, window_s=600))
    assert found.tokens["total"] > found.max_positions and not found.fits


def test_wishes_that_make_no_sense():
    for bad in ({"seconds": -1}, {"frames": -1}, {"window_s": 0}, {"seconds": 0, "frames": 0}):
        with pytest.raises(InputError, match="can't be planned"):
            plan(SEVEN, RECIPE, wish(**bad))


def test_wide_models_take_smaller_chunks():
    assert prefill_chunk(256) == prefill_chunk(2048) == 1024
    assert prefill_chunk(3584) == 512

"""TMRoPE positions: by hand, and against transformers' own."""

import numpy as np
import pytest

from crab_edge.errors import CrabError
from crab_edge.features import FeatureConfig, audio_token_count
from crab_edge.positions import next_position, tmrope
from crab_edge.prompt import MediaItem, SpecialIds

CFG = FeatureConfig()
IDS = SpecialIds(
    audio=103, audio_bos=104, audio_eos=105, vision_bos=106, vision_eos=107, image=108, video=109,
    im_start=101, im_end=102, pad=100,
)  # fmt: skip


def sequence(*parts) -> tuple[np.ndarray, list[MediaItem]]:
    """Ids and items: a number is so much text, else ("audio", mel frames) or (kind, (T, H, W))."""
    ids: list[int] = []
    items = []
    for part in parts:
        if isinstance(part, int):
            ids += range(1, part + 1)
        elif part[0] == "audio":
            items.append(MediaItem.audio(part[1]))
            ids += [IDS.audio_bos, *[IDS.audio] * items[-1].tokens, IDS.audio_eos]
        else:
            items.append(MediaItem.visual(part[0], part[1], CFG))
            ids += [IDS.vision_bos, *[getattr(IDS, part[0])] * items[-1].tokens, IDS.vision_eos]
    return np.array(ids, np.int64), items


def official(ids: np.ndarray, parts, seconds: float = 2.0) -> np.ndarray:
    """transformers' get_rope_index on the same sequence."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    from types import SimpleNamespace

    config = SimpleNamespace(
        image_token_id=IDS.image,
        video_token_id=IDS.video,
        audio_token_id=IDS.audio,
        vision_start_token_id=IDS.vision_bos,
        audio_start_token_id=IDS.audio_bos,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    base = module.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    stand_in = SimpleNamespace(config=config, spatial_merge_size=2)
    stand_in.get_llm_pos_ids_for_vision = base.get_llm_pos_ids_for_vision.__get__(stand_in)
    media = [p for p in parts if not isinstance(p, int)]
    grids = {k: [p[1] for p in media if p[0] == k] for k in ("video", "image")}
    lengths = [p[1] for p in media if p[0] == "audio"]
    positions, _ = base.get_rope_index(
        stand_in,
        torch.tensor(ids)[None],
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        audio_seqlens=torch.tensor(lengths) if lengths else None,
        second_per_grids=torch.tensor([seconds] * len(grids["video"])) if grids["video"] else None,
    )
    return positions[:, 0].numpy()


VIDEO, STILL = ("video", (5, 16, 16)), ("image", (1, 16, 16))
LAYOUTS = {
    "text only": (7,),
    "video and audio": (3, VIDEO, ("audio", 1000), 9),
    "image and audio": (3, STILL, ("audio", 502), 4),
    "audio only": (3, ("audio", 100), 4),
    "video only": (3, VIDEO, 4),
    "image only": (2, STILL, 1),
    "two videos and an audio": (3, ("audio", 1000), VIDEO, VIDEO, 4),
    "one video of twenty frames": (3, ("audio", 1000), ("video", (10, 16, 16)), 4),
    "video and two audios": (3, VIDEO, ("audio", 400), ("audio", 333), 4),
    "four frames": (3, ("video", (2, 16, 16)), ("audio", 400), 2),
    "text between media": (1, STILL, 5, ("audio", 201), 2, VIDEO, 1),
    "other grid": (2, ("video", (3, 8, 20)), ("image", (1, 4, 6)), 3),
    "nothing behind the media": (3, VIDEO, ("audio", 1000)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_transformers(name):
    ids, items = sequence(*LAYOUTS[name])
    ours = tmrope(ids, IDS, items, CFG)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, official(ids, LAYOUTS[name]))


@pytest.mark.parametrize("frames", [*range(3, 12), 99, 101, 199, 201, 203, 501, 999])
def test_odd_audio_lengths_equal_transformers(frames):
    layout = (2, STILL, ("audio", frames), 3)
    ids, items = sequence(*layout)
    np.testing.assert_array_equal(tmrope(ids, IDS, items, CFG), official(ids, layout))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.23, 0.0833333])
def test_other_frame_rates_equal_transformers(seconds):
    layout = (2, ("video", (7, 4, 4)), 3)
    ids, items = sequence(*layout)
    cfg = FeatureConfig(seconds_per_grid=seconds)
    np.testing.assert_array_equal(tmrope(ids, IDS, items, cfg), official(ids, layout, seconds))


def test_by_hand_small_video_and_audio():
    """Two text tokens, bos, a grid of 2 x 1 x 2 groups, eos, bos, two audio tokens, eos, one text token."""
    ids, items = sequence(2, ("video", (2, 2, 4)), ("audio", 8), 1)
    t = [0, 1, 2, 3, 3, 53, 53, 54, 55, 56, 57, 58, 59]
    h = [0, 1, 2, 3, 3, 3, 3, 54, 55, 56, 57, 58, 59]
    w = [0, 1, 2, 3, 4, 3, 4, 54, 55, 56, 57, 58, 59]
    assert audio_token_count(8) == 2
    assert tmrope(ids, IDS, items, CFG).tolist() == [t, h, w]


def test_reference_shapes():
    """Crab+ reference, 3.5: ten frames advance by 201 ids, a still by 8, ten seconds of sound by 250."""
    for part, step in ((VIDEO, 201), (STILL, 8), (("audio", 1000), 250)):
        ids, items = sequence(4, part)
        positions = tmrope(ids, IDS, items, CFG)
        assert next_position(positions) == 4 + 1 + step + 1
    positions = tmrope(*(lambda s: (s[0], IDS, s[1], CFG))(sequence(VIDEO)))
    assert np.unique(positions[0, 1:-1]).tolist() == [1, 51, 101, 151, 201]


def test_a_suffix_continues_where_the_prefix_ends():
    ids, items = sequence(3, VIDEO, ("audio", 1000), 9)
    whole = tmrope(ids, IDS, items, CFG)
    cut = len(ids) - 9
    prefix = tmrope(ids[:cut], IDS, items, CFG)
    suffix = tmrope(ids[cut:], IDS, (), CFG, start=next_position(prefix))
    np.testing.assert_array_equal(np.concatenate([prefix, suffix], axis=1), whole)


def test_nothing():
    assert tmrope(np.zeros(0, np.int64), IDS, (), CFG).shape == (3, 0)
    assert next_position(np.zeros((3, 0), np.int64)) == 0


def test_placeholders_and_items_must_match():
    ids, items = sequence(3, VIDEO, ("audio", 100), 2)
    for wrong in (items[:1], [*items, items[0]], items[::-1], [MediaItem("video", 319, None), items[1]]):
        with pytest.raises(CrabError):
            tmrope(ids, IDS, wrong, CFG)
    with pytest.raises(CrabError, match="makes 64 tokens"):
        tmrope(ids, IDS, [MediaItem("video", 320, (1, 16, 16)), items[1]], CFG)

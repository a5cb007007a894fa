"""The decoder starts knowing where a cell lies, when a sound is heard, and which frame it sees."""

import numpy as np
import pytest
import torch

from crab_edge.features import FeatureConfig
from crab_edge.model import nano_config
from crab_edge.positions import tmrope
from crab_edge.prompt import MediaItem, SpecialIds
from crab_edge.training.language import decode
from crab_edge.training.starts import clocks, initialise_decoder

SPECIAL = SpecialIds(
    audio=100,
    audio_bos=101,
    audio_eos=102,
    vision_bos=103,
    vision_eos=104,
    image=105,
    video=106,
    im_start=107,
    im_end=108,
    pad=109,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 6, 24]}


@pytest.fixture(scope="module")
def told():
    """R2 of a linear reading of (row, column, slice, second) from states after layer k of an untrained
    decoder.
    """
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

    torch.manual_seed(0)
    config = nano_config(vocab_size=128, rope_parameters=ROPE, num_hidden_layers=3)
    text = Qwen2_5OmniThinkerTextModel(config.text_config).eval()
    items = [MediaItem("video", 5 * 64, (5, 16, 16)), MediaItem("audio", 250, None)]
    ids = np.array([107, 3, 4, 5, 108, 6, 107, 7, 8, 103, *[106] * 320, 104, 101, *[100] * 250, 102])
    positions = torch.from_numpy(tmrope(ids, SPECIAL, items, FeatureConfig(n_mels=80)))[:, None]
    truth = {
        "row": (106, torch.arange(8.0).repeat_interleave(8).repeat(5)),
        "column": (106, torch.arange(8.0).repeat(40)),
        "slice": (106, torch.arange(5.0).repeat_interleave(64)),
        "second": (100, torch.arange(250.0) / 25),
    }
    places = torch.from_numpy(ids)
    mask = torch.ones(len(ids), len(ids)).tril().bool()[None, None]

    def read(special):
        initialise_decoder(text, special)
        media = torch.randn(8, len(ids), config.text_config.hidden_size) * 0.15
        embeds = text.embed_tokens(places)[None].repeat(8, 1, 1)
        is_media = (places == 106) | (places == 100)
        embeds[:, is_media] = media[:, is_media]
        with torch.no_grad():
            rotary = text.rotary_emb(embeds[:1], positions)
            states = [decode(text, e[None], rotary, mask)[1][2][0] for e in embeds]
        out = {}
        for name, (token, value) in truth.items():
            own = places == token
            x = torch.cat([s[own] for s in states])
            x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
            y = value.repeat(8)
            fit = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
            a, b = fit[: len(x) // 2], fit[len(x) // 2 :]
            ridge = x[a].T @ x[a] + 0.1 * torch.eye(x.shape[1])
            said = x[b] @ torch.linalg.solve(ridge, x[a].T @ y[a])
            out[name] = 1 - float(((said - y[b]) ** 2).mean() / y[b].var())
        return out

    return read(None), read(SPECIAL)


@pytest.mark.parametrize("what", ["row", "column", "slice", "second"])
def test_places_and_times_can_be_read_linearly(told, what):
    without, with_clocks = told
    assert with_clocks[what] > 0.8
    assert with_clocks[what] > without[what] + 0.1


def test_no_clocks_where_the_decoder_has_no_room_for_them():
    assert clocks(nano_config(num_attention_heads=2, num_key_value_heads=1).text_config, SPECIAL) == []


def test_every_clock_has_a_head_of_its_own():
    config = nano_config(rope_parameters=ROPE).text_config
    own = clocks(config, SPECIAL)
    assert len({(c.layer, c.head) for c in own}) == len(own) == 4
    assert {c.opening for c in own} == {SPECIAL.vision_bos, SPECIAL.audio_bos}

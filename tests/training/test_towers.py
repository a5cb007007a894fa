"""The batched forwards of both encoders equal the official ones, gradients included."""

import pytest
import torch

from crab_edge.model import build, nano_config
from crab_edge.training.towers import VisionGrid, audio_tokens, vision_cells


@pytest.fixture(scope="module")
def thinker():
    config = nano_config(num_hidden_layers=1)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 32, 48
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    config.audio_config.encoder_layers, config.audio_config.encoder_ffn_dim = 2, 64
    return build(config, seed=1).double()


def test_vision_equals_official(thinker):
    tower = thinker.model.visual
    x = torch.randn(3 * 256, 1176, dtype=torch.float64)
    official = tower(x, grid_thw=torch.tensor([[1, 16, 16], [2, 16, 16]])).pooler_output
    ours = vision_cells(tower, x, VisionGrid(tower)).reshape(3 * 64, -1)
    # The official rotary embedding computes in float32 whatever the model's dtype.
    torch.testing.assert_close(ours, official, rtol=1e-5, atol=1e-6)
    seed = torch.randn_like(official)
    wanted = torch.autograd.grad(official, tower.blocks[0].attn.q.weight, seed)[0]
    got = torch.autograd.grad(ours, tower.blocks[0].attn.q.weight, seed)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [100, 200, 502])
def test_audio_equals_official(thinker, frames):
    tower = thinker.model.audio_tower
    mel = torch.randn(80, frames, dtype=torch.float64)
    official = tower(mel, feature_lens=torch.tensor([frames])).last_hidden_state
    count = -(-frames // 200)
    chunks = torch.zeros(count, 80, 200, dtype=torch.float64)
    lengths = torch.full((count,), 200)
    lengths[-1] = frames - 200 * (count - 1)
    for i in range(count):
        part = mel[:, 200 * i : 200 * (i + 1)]
        chunks[i, :, : part.shape[1]] = part
    tokens, valid = audio_tokens(tower, chunks, lengths)
    torch.testing.assert_close(tokens[valid], official, rtol=1e-7, atol=1e-8)

"""How the decoder starts: it averages what came before, and encoders say no constant."""

import pytest
import torch

from crab_edge.model import build, nano_config
from crab_edge.training.language import LanguageModule, centre_projections, decode
from crab_edge.training.starts import initialise_decoder


@pytest.fixture
def thinker():
    return build(nano_config(), seed=3)


def test_attention_starts_as_an_average_of_a_projection(thinker):
    text = thinker.model.language_model
    initialise_decoder(text, gain=0.1)
    attention = text.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, text.config.hidden_size, generator=generator)
    torch.nn.init.zeros_(attention.q_proj.weight)  # exactly uniform attention
    positions = torch.arange(6).expand(3, 1, 6)
    mask = torch.ones(6, 6).tril().bool()[None, None]
    said = attention(x, position_embeddings=text.rotary_emb(x, positions), attention_mask=mask)[0]
    basis = attention.v_proj.weight
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    mean = x.cumsum(dim=1) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(said, 0.1 * mean @ basis.T @ basis, atol=1e-5, rtol=1e-4)


def test_centred_encoders_average_to_nothing(thinker):
    module = LanguageModule(thinker, None, [], train_projections=True)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "patches": torch.randn(2 * 256, 1176, generator=generator),
        "chunks": torch.randn(3, 80, 200, generator=generator),
        "lengths": torch.tensor([200, 200, 120]),
    }
    before = module.encode(batch)
    centre_projections(module, [batch])
    with torch.no_grad():
        after = module.encode(batch)
    for old, new in zip(before, after, strict=True):
        old, new = old.flatten(0, -2), new.flatten(0, -2)
        assert old.mean(dim=0).norm() > 1e-3
        assert new.mean(dim=0).norm() < 1e-4
        torch.testing.assert_close(new - new[:1], old - old[:1], atol=1e-4, rtol=1e-4)


def test_held_clocks_dont_move_and_the_rest_does(thinker):
    from types import SimpleNamespace

    special = SimpleNamespace(im_start=1, vision_bos=2, audio_bos=3)
    module = LanguageModule(thinker, special, [])
    groups = module.base_groups(hold_clocks=True)
    text = thinker.model.language_model
    before = {name: p.detach().clone() for name, p in text.named_parameters()}
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    embeds = text.embed_tokens(ids)
    positions = torch.arange(5).expand(3, 1, 5)
    mask = torch.ones(5, 5).tril().bool()[None, None]
    decode(text, embeds, text.rotary_emb(embeds, positions), mask)[0].square().sum().backward()
    optimizer.step()
    after = dict(text.named_parameters())
    assert not any((after[n] != before[n]).any() for n in after if n.startswith("layers.0.self_attn."))
    moved = (after["embed_tokens.weight"] != before["embed_tokens.weight"]).any(dim=1)
    assert moved[[4, 5]].all() and not moved[[1, 2, 3]].any()
    assert (after["layers.1.self_attn.v_proj.weight"] != before["layers.1.self_attn.v_proj.weight"]).any()

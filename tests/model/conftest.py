"""A tiny thinker and a tiny tokenizer for it."""

from importlib.util import find_spec

import pytest

if all(find_spec(name) for name in ("torch", "transformers", "peft")):
    import torch

    torch.set_num_threads(2)
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from crab_edge.model.config import PAD_TOKEN, TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PAD_TOKEN, *TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant dog"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_config(tokenizer_file):
    from crab_edge.model import nano_config, with_tokenizer

    config = nano_config(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=1)
    config.text_config.num_key_value_heads = 1
    vision, audio = config.vision_config, config.audio_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 48, 2
    vision.fullatt_block_indexes, vision.out_hidden_size = [1], 64
    audio.encoder_layers, audio.d_model, audio.encoder_ffn_dim, audio.encoder_attention_heads = 1, 32, 64, 2
    audio.output_dim = 64
    return with_tokenizer(config, tokenizer_file)


@pytest.fixture
def tiny(tiny_config):
    from crab_edge.model import build

    return build(tiny_config, seed=3)


@pytest.fixture
def drawn():
    """Configuration of an adapter whose experts aren't zero, so that it does something."""
    from crab_edge.model import ILoRAConfig

    return ILoRAConfig(r=4, lora_alpha=8, init_weights=False)

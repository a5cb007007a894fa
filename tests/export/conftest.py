"""A tiny model, its adapter and a 4-bit bundle of both, made once a session."""

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directories `base` and `adapter`, and the float engine `torch` on them."""
    import torch

    from crab_edge.engines.torch import TorchEngine
    from tests.tiny_model import make_tiny_model_dir

    torch.set_num_threads(2)
    base, adapter = make_tiny_model_dir(tmp_path_factory.mktemp("tiny"))
    engine = TorchEngine.load(base, adapter)
    return SimpleNamespace(base=base, adapter=adapter, torch=engine, config=engine._config)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """The path of a 4-bit bundle of the tiny model, with exact products (accuracy level 0)."""
    from tests.tiny_model import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("tiny_bundle"))

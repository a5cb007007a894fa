"""Fixtures that several rooms share. Nothing here needs a network or a GPU."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Real clips kept beside the checkout by the developers; absent at a user's."""
    folder = REPOSITORY.parent / "shared" / "samples"
    if not folder.is_dir():
        pytest.skip("the developers' sample clips aren't beside this checkout")
    return folder

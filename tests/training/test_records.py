"""Micro-batches of records: each record once an epoch, the same line whatever the number of processes."""

import pytest

from crab_edge import tasks
from crab_edge.features import FeatureConfig
from crab_edge.training.avuie import AvuieScenes
from crab_edge.training.data import batches
from crab_edge.training.records import RecordBatches, Unusable
from tests.tiny import tiny_tokenizer
from tests.tiny_avuie import make_tiny_avuie


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_tiny_avuie(tmp_path_factory.mktemp("data"), stills=3, clips=2)


def make(root, folder, batch=2, seed=1):
    lists = [(tasks.get(name), root / name / "train.json") for name in ("s4", "cremad")]
    features = FeatureConfig(n_mels=32, system_prompt="x")
    builder = (str(tiny_tokenizer(folder / "t.json")), features)
    return RecordBatches(AvuieScenes(lists), builder, batch=batch, seed=seed)


def test_every_record_once_an_epoch_in_an_order_of_its_own(root, tmp_path):
    line = [i for number in range(20) for i in make(root, tmp_path).indices(number)]
    epochs = [line[k : k + 5] for k in range(0, 40, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    assert line != [i for number in range(20) for i in make(root, tmp_path, seed=2).indices(number)]


def test_processes_share_the_line(root, tmp_path):
    micro = make(root, tmp_path)
    micro.__class__ = type("Named", (RecordBatches,), {"__call__": lambda self, i: self.indices(i)})
    alone = list(batches(micro, 0, 6, workers=0))
    halves = [list(batches(micro, 0, 3, workers=0, world=2, rank=rank)) for rank in (0, 1)]
    assert alone == [half[i] for i in range(3) for half in halves]


def test_stills_and_clips_share_a_batch_and_only_answers_count(root, tmp_path):
    micro = make(root, tmp_path, batch=5)
    batch = micro(0)
    assert set(batch) == {
        "ids",
        "positions",
        "segment",
        "targets",
        "pixels",
        "patches",
        "chunks",
        "lengths",
    }
    builder = micro._builder
    said = []
    for ids, targets in zip(batch["ids"], batch["targets"], strict=True):
        seen = int((ids == builder.special.video).sum() + (ids == builder.special.image).sum())
        assert seen in (64, 128)
        said.append(builder.decode(targets[targets >= 0].tolist()))
    # A still is one temporal slice of 256 patches, four frames are two.
    assert batch["patches"].shape[0] == (3 * 1 + 2 * 2) * 256
    assert sorted(said) == sorted(
        ["\n<answer>joy</answer>"] * 2
        + ["\nThe sounding object is dog. [12,30,200,210]"] * 2
        + ["\nThe sounding object is bus. [1,2,30,40]"]
    )


def test_an_unreadable_record_is_named(root, tmp_path):
    data = make_tiny_avuie(tmp_path / "broken", stills=3, clips=2)
    (data / "s4/audio/1.wav").write_bytes(b"no sound")
    found = [make(data, tmp_path, batch=1)(number) for number in range(5)]
    (bad,) = [f for f in found if isinstance(f, Unusable)]
    assert "s4: " in bad.message and "1.wav" in bad.message

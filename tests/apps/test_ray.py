"""Two Ray workers on this machine, one of them killed midway: every row is there once."""

import json
import os
import subprocess
import sys

import pytest
from crab_edge_apps import _ray

from crab_edge.errors import DependencyError, EngineError
from tests import media
from tests.shared_bundle import shared_tiny_bundle

# A process of its own: Ray leaves threads and handlers behind in one that it was started in.
DRIVER = """
import json, os, signal, sys, threading
from pathlib import Path
from crab_edge_apps import _ray
from crab_edge.batch import Request
from crab_edge.errors import CrabError

bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
producer = _ray.connect("local", bundle=bundle, engine="auto", threads=1, workers=2)
crew = producer.crew
request = Request(("avcap", "ave"), max_new_tokens=4, grammar=False).check()
rows, killed = [], None
for row, clip in producer.produce(sorted(folder.iterdir()), request, lambda *_: False, threading.Event()):
    rows.append([row.media[0], row.task, row.error and row.error.type, clip])
    if killed is None and len(crew.pids) == 2 and len(producer.busy) == 2:
        killed = next(name for name, items in producer.busy.items() if items)
        os.kill(crew.pids[killed][1], signal.SIGKILL)
for name in list(crew._actors):
    crew._dead(name, CrabError("makes room"))
other = _ray.RayCrew(folder / "nowhere", "auto", 1, None)
other.start()
try:
    other.first()
    refusal = "none"
except CrabError as error:
    refusal = f"{type(error).__name__}: {error}"
said = {"rows": rows, "killed": killed, "deaths": producer.deaths, "bundle": producer.bundle}
print(json.dumps(said | {"refusal": refusal}))
producer.close()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the driver said of twelve clips and a file that is none."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("ray") / "clips"
    folder.mkdir()
    for number in range(12):
        media.video(folder / f"{number:02d}.mp4", seconds=1 + number / 10, fps=4)
    (folder / "99.mp4").write_bytes(b"not a video")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(shared_tiny_bundle()), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_workers_one_killed(said):
    assert said["killed"] and said["deaths"] == 1
    found = sorted((path.rsplit("/", 1)[1], task, error) for path, task, error, _ in said["rows"])
    names = [f"{number:02d}.mp4" for number in range(12)]
    expected = [(name, task, None) for name in names for task in ("avcap", "ave")]
    assert found == sorted([*expected, ("99.mp4", "avcap", "MediaError"), ("99.mp4", "ave", "MediaError")])
    assert all(clip is None for *_, clip in said["rows"])


def test_a_bundle_that_workers_cannot_open_is_its_own_error(said):
    assert said["refusal"].startswith("BundleError: ") and "nowhere" in said["refusal"]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"crab-edge\[ray\]"):
        _ray.connect("local", bundle=None, engine="auto", threads=1)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_refused_at_once(address):
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match=f"--ray {address}: no Ray cluster can be reached"):
        _ray.connect(address, bundle=None, engine="auto", threads=1)

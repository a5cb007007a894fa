"""Two Ray workers on this machine, one of them killed midway: every row is there once."""

import json
import os
import subprocess
import sys

import pytest

from tests import media
from tests.shared_bundle import shared_tiny_bundle

ray = pytest.importorskip("ray")

DRIVER = """
import json, os, signal, sys, threading
from pathlib import Path
from crab_edge_apps import _ray
from crab_edge.batch import Request

bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
producer = _ray.connect("local", bundle=bundle, engine="auto", threads=1, workers=2)
request = Request(("avcap", "ave"), max_new_tokens=4).check()
rows, killed = [], None
for row, clip in producer.produce(sorted(folder.iterdir()), request, lambda *_: False, threading.Event()):
    rows.append([row.media[0], row.task, row.error and row.error.type, clip])
    if killed is None and len(producer.crew.pids) == 2 and len(producer.busy) == 2:
        killed = next(name for name, items in producer.busy.items() if items)
        os.kill(producer.crew.pids[killed][1], signal.SIGKILL)
print(json.dumps({"rows": rows, "killed": killed, "deaths": producer.deaths, "bundle": producer.bundle}))
producer.close()
"""


def driver(*arguments):
    """A process of its own: Ray leaves threads and handlers behind in one that it was started in."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def test_two_workers_one_killed(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(12):
        media.video(folder / f"{number:02d}.mp4", seconds=1 + number / 10, fps=4)
    (folder / "99.mp4").write_bytes(b"not a video")
    done = driver(shared_tiny_bundle(), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["killed"] and said["deaths"] == 1
    found = sorted((path.rsplit("/", 1)[1], task, error) for path, task, error, _ in said["rows"])
    names = [f"{number:02d}.mp4" for number in range(12)]
    expected = [(name, task, None) for name in names for task in ("avcap", "ave")]
    assert found == sorted([*expected, ("99.mp4", "avcap", "MediaError"), ("99.mp4", "ave", "MediaError")])


def test_a_bundle_that_workers_cannot_open_is_one_error(tmp_path):
    done = driver(tmp_path / "nowhere", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "BundleError" in last and "nowhere" in last

"""A run that is killed at any instant and started again ends with the same rows as one that isn't."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crab_edge.rows import read_rows
from tests import media

KILLS = 50
TASKS = ["--task", "avcap,avqa,arig", "--question", "Is it?"]  # the last one fails: a picture has no sound
HERE = Path(__file__).resolve()


class Server:
    """`killed_run.py`: one process with everything imported, which forks a real run for each command line."""

    def __init__(self, slow_s):
        root = HERE.parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, HERE.with_name("killed_run.py"), str(slow_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def run(self, arguments, out=None, grown_to=0, after_s=0.0):
        """The exit status as waitpid gives it: 0, SIGKILL, or 256 times the exit code.

        With `out`, it is killed `after_s` after the rows there have grown to so many bytes.
        """
        order = {
            "arguments": [str(argument) for argument in arguments],
            "file": str(out / "rows.jsonl") if out else None,
            "grown_to": grown_to,
            "after_s": after_s,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server():
    server = Server(slow_s=0.002)
    yield server
    server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve clips, two of them copies, and two that are none."""
    root = tmp_path_factory.mktemp("in")
    for number in range(10):
        media.picture(root / f"{number:02}.png", width=20 + number, height=20)
    media.sound(root / "10.wav", media.tone(0.3))
    for name in ("20.png", "21.png"):
        shutil.copy(root / "03.png", root / name)
    (root / "30.mp4").write_bytes(b"no media")
    (root / "31.mp4").write_bytes(b"")
    return root


def comparable(out):
    """The rows without what no two runs have in common."""
    lines = (out / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("timings", None)
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def size_of(out):
    path = out / "rows.jsonl"
    return path.stat().st_size if path.exists() else 0


def test_killed_at_fifty_random_points(server, inputs, fake_bundle, tmp_path):
    def command(out):
        return ["analyze", inputs, *TASKS, "--out", out, "--bundle", fake_bundle]

    assert server.run(command(tmp_path / "whole")) == 0
    expected, size = comparable(tmp_path / "whole"), size_of(tmp_path / "whole")
    assert len(expected) == 3 * 15 and len(set(expected)) == 3 * 15
    chance = random.Random(7)
    killed, points, number = 0, set(), 0
    while killed < KILLS:
        out = tmp_path / str(number)
        number += 1
        assert number < 4 * KILLS, "the runs end before they can be killed"
        while killed < KILLS and size_of(out) < 0.97 * size:  # timings differ in length
            point = chance.uniform(size_of(out), size)
            if chance.random() < 0.1:
                point = 0  # before the first row, or while the old ones are read
            status = server.run(command(out), out, point, chance.uniform(0, 0.01))
            assert status in (0, signal.SIGKILL)
            if status == 0:
                break
            killed += 1
            points.add(size_of(out))
        assert server.run(command(out)) == 0
        assert comparable(out) == expected
    assert len(points) >= 20, f"killed at different points of the run, not only at {points} bytes"


def test_killed_while_errors_are_tried_again(server, inputs, fake_bundle, tmp_path):
    """The old error rows go only when the new ones are there."""

    def command(*more):
        return ["analyze", folder, "--task", "avcap,s4", "--out", out, "--bundle", fake_bundle, *more]

    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(b"")
    assert server.run(command()) == 512, "exit code 2: nothing was readable"
    for number in range(8):
        shutil.copy(inputs / f"{number:02}.png", folder / f"{number}.png")
    whole = tmp_path / "whole"
    assert server.run(["analyze", folder, "--task", "avcap,s4", "--out", whole, "--bundle", fake_bundle]) == 0
    chance, killed, mixed = random.Random(3), 0, 0
    for _ in range(12):
        point = size_of(out) + chance.uniform(0, 1500)
        status = server.run(command("--retry-errors"), out, point, chance.uniform(0, 0.01))
        killed += status == signal.SIGKILL
        seen = list(read_rows(out))
        mixed += 0 < sum("error" in row for row in seen) < len(seen)
        assert sorted((row["media"][0][-5:], row["task"]) for row in seen) == [
            (f"{number}.png", task) for number in range(8) for task in ("avcap", "s4")
        ], "each once, at any time"
    assert killed >= 3 and mixed, "it was killed, and with rows of both kinds"
    assert server.run(command("--retry-errors")) == 0
    assert comparable(out) == comparable(whole)

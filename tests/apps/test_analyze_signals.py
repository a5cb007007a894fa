"""Signals and watch mode, on real processes: one Ctrl-C finishes the clip, two leave, watching just ends."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crab_edge.rows import read_rows
from tests import media

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["avcap", "avqa"]


class Run:
    """`crab-edge analyze` with the stand-in engine of `killed_run.py`; its stderr is read as it comes."""

    def __init__(self, *arguments, slow_s=0.0, fast=0):
        script = (
            "import sys; from tests.apps.killed_run import analyze; "
            f"sys.exit(analyze(sys.argv[1:], {slow_s}, {fast}))"
        )
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, "analyze", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def until(self, condition):
        """Waits for it; fails if the process ends before."""
        for _ in range(6000):
            if condition():
                return
            assert self.process.poll() is None, (self.process.returncode, self.said)
            time.sleep(0.01)
        pytest.fail("nothing happened for a minute")

    def signal(self, number=signal.SIGINT):
        self.process.send_signal(number)

    def end(self):
        """(exit code, stdout, stderr)"""
        out = self.process.stdout.read()
        code = self.process.wait(60)
        self._reader.join(10)
        return code, out, "".join(self.said)


@pytest.fixture
def started(tmp_path, fake_bundle):
    """started(words..., slow_s=...) -> a run into tmp_path/out; killed at the end if it is still there."""
    runs = []

    def start(*words, **how):
        options = [
            "--task",
            ",".join(TASKS),
            "--question",
            "Is it?",
            "--out",
            tmp_path / "out",
            "--bundle",
            fake_bundle,
        ]
        runs.append(Run(*words, *options, **how))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for number in range(6):
        media.picture(root / f"{number}.png", width=20 + number)
    return root


def written(tmp_path):
    path = tmp_path / "out" / "rows.jsonl"
    return [(Path(row["media"][0]).name, row["task"]) for row in read_rows(path)] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_clip_at_hand(started, folder, tmp_path, number):
    run = started(folder, slow_s=0.3)
    run.until(lambda: written(tmp_path))
    run.signal(number)
    code, out, said = run.end()
    found = written(tmp_path)
    assert code == 130 and "interrupted; run the same" in said and "stopping after the clip at hand" in said
    assert len(found) < 12 and len(found) % 2 == 0, "whole clips"
    assert f"{len(found)} answers" in out, "with a summary"
    again = started(folder)
    assert again.end()[0] == 0 and written(tmp_path)[: len(found)] == found
    assert sorted(written(tmp_path)) == sorted((f"{n}.png", task) for n in range(6) for task in TASKS)


def test_two_signals_leave_at_once(started, folder, tmp_path):
    run = started(folder, slow_s=600, fast=1)
    run.until(lambda: len(written(tmp_path)) == 2)
    run.signal()
    run.until(lambda: any("stopping" in line for line in run.said))
    run.signal()
    code, _, said = run.end()
    assert code == 130 and said.splitlines()[-1] == "crab-edge: interrupted"
    assert len(written(tmp_path)) == 2
    (folder / "0.png").unlink()
    assert started(folder).end()[0] == 0, "the output isn't locked any more"


def test_watching(started, folder, tmp_path):
    for number in (3, 4, 5):
        (folder / f"{number}.png").unlink()
    run = started(folder, tmp_path / "later", tmp_path / "*.jpg", "--watch", "--settle", "0.3")
    run.until(lambda: len(written(tmp_path)) == 6)
    content = media.picture(tmp_path / "source.jpg", width=90).read_bytes()
    with open(folder / "slow.jpg", "wb") as file:
        for start in range(0, len(content), len(content) // 8):
            file.write(content[start : start + len(content) // 8])
            file.flush()
            time.sleep(0.1)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "x.png.part").write_bytes((folder / "1.png").read_bytes() + b"x")
    run.until(lambda: ("slow.jpg", "avqa") in written(tmp_path))
    assert not any(name.startswith("x.png") for name, _ in written(tmp_path))
    (tmp_path / "later" / "x.png.part").rename(tmp_path / "later" / "x.png")
    shutil.copy(folder / "2.png", tmp_path / "later" / "copy.png")
    run.until(lambda: len(written(tmp_path)) == 14)
    run.signal()
    code, out, said = run.end()
    assert code == 0 and "error" not in said, said
    assert "0 errors" in out and "14 answers" in out
    names = ["0.png", "1.png", "2.png", "slow.jpg", "source.jpg", "x.png", "copy.png"]
    assert sorted(written(tmp_path)) == sorted((name, task) for name in names for task in TASKS)

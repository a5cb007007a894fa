"""Starts `crab-edge analyze` with a stand-in engine, for tests that kill it. Not a test itself.

    python killed_run.py SECONDS_PER_PICTURE

Each line on stdin is JSON: {"arguments": [...], "file": path, "grown_to": bytes, "after_s": seconds}. After
its imports the script forks one process a line, which runs that command line, kills it so long after the file
has that size (never without `file`), and prints its exit status.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time


def stand_in(slow_s: float, fast: int):
    """An engine whose answer depends on nothing but the media's embeddings, so on the clip and the task.

    A picture takes it `slow_s` seconds, except for the first `fast` ones, and a prompt at most 2 ms.
    """
    from tests.fake_bundle import HIDDEN, FakeEngine

    class Engine(FakeEngine):
        def vision(self, pixel_values):
            import numpy as np

            time.sleep(slow_s if len(self.vision_calls) >= fast else 0)
            self.vision_calls.append(len(pixel_values))
            value = int(hashlib.sha256(pixel_values.tobytes()).hexdigest()[:4], 16)
            return np.full((len(pixel_values) // 4, HIDDEN), float(value), np.float32)

        def forward(self, embeds, position_ids):
            if embeds.shape[1] > 1:
                time.sleep(min(slow_s, 0.002))
                self._answers = f"a clip of {int(embeds.max())} and {embeds.shape[1]}"
            return super().forward(embeds, position_ids)

    return Engine


def analyze(arguments: list[str], slow_s: float = 0.0, fast: int = 0) -> int:
    """The command line with every engine replaced by the stand-in; its exit code."""
    from crab_edge_apps.cli import run

    from crab_edge import engines

    engine = stand_in(slow_s, fast)
    engines.create = lambda name, bundle, *, threads=None: engine(bundle)
    return run(arguments)


def main() -> None:
    """Serves command lines until the end of stdin."""
    slow_s = float(sys.argv[1])
    import av
    import numpy
    import rich.console
    import soxr
    from crab_edge_apps import _batch_progress, _rows, cli
    from crab_edge_apps import analyze as _
    from PIL import Image

    from crab_edge import batch, session
    from tests import fake_bundle

    assert all(
        (av, numpy, rich.console, soxr, _batch_progress, _rows, _, cli, Image, batch, session, fake_bundle)
    )
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
            try:
                code = analyze(order["arguments"], slow_s)
            finally:
                sys.stderr.flush()
                os._exit(code)
        if order["file"] is not None:
            while _size(order["file"]) < order["grown_to"] and not _ended(child):
                time.sleep(0.0005)
            time.sleep(order["after_s"])
            os.kill(child, signal.SIGKILL)  # until it is waited for, its number is nobody else's
        print(os.waitpid(child, 0)[1], flush=True)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    main()

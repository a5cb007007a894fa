"""Work handed to workers that die, and every row back once; the workers are a script here."""

import threading
from collections import deque
from pathlib import Path

import pytest
from crab_edge_apps._crew import ATTEMPTS, CLIPS_AT_ONCE, CrewProducer, News

from crab_edge.batch import Request
from crab_edge.errors import CrabError, EngineError
from crab_edge.rows import Row

REQUEST = Request(("ave", "avcap"))


class ScriptedCrew:
    """Workers that answer one file at each `wait`; `dies(worker, path)` says which files kill them."""

    def __init__(self, dies=lambda worker, path: False, never_ready=()):
        self.dies, self.never_ready = dies, never_ready
        self.started = 0
        self.news = deque()
        self.work = {}
        self.given = []
        self.halted = False

    def start(self):
        self.started += 1
        if self.started not in self.never_ready:
            self.news.append(News(self.started, "ready"))
        return self.started

    def give(self, worker, work, request):
        assert worker not in self.work, "a worker is given work while it has some"
        self.given.append((worker, [path.name for path, _ in work]))
        self.work[worker] = deque(work)

    def wait(self, timeout_s):
        found = [self.news.popleft() for _ in range(len(self.news))]
        for worker in list(self.work):
            left = self.work[worker]
            if not left or self.halted:
                del self.work[worker]
                found.append(News(worker, "done"))
                continue
            path, names = left.popleft()
            if self.dies(worker, path):
                del self.work[worker]
                found.append(News(worker, "dead", reason=f"{worker} is gone"))
            else:
                found.append(News(worker, "rows", [Row((str(path),), name, "0" * 64) for name in names]))
        return found

    def halt(self):
        self.halted = True

    def close(self):
        pass


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number:02d}.mp4" for number in range(11)]
    for number, path in enumerate(paths):
        path.write_bytes(b"clip %d" % number)
    return paths


def produced(crew, files, size=2, skip=lambda *_: False, stop=None):
    producer = CrewProducer(crew, "bundle", {"name": "fake"}, size)
    for _ in range(size):
        crew.start()
    rows = [row for row, _ in producer.produce(files, REQUEST, skip, stop or threading.Event())]
    return rows, producer


def keys(rows):
    return sorted((Path(row.media[0]).name, row.task) for row in rows)


def everything(files):
    return sorted((path.name, task) for path in files for task in REQUEST.tasks)


def test_every_row_once_and_a_files_rows_together(files):
    crew = ScriptedCrew()
    rows, _ = produced(crew, files)
    assert keys(rows) == everything(files) and not any(row.error for row in rows)
    assert [row.task for row in rows] == list(REQUEST.tasks) * len(files)
    assert len({worker for worker, _ in crew.given}) == 2
    assert max(len(names) for _, names in crew.given) <= CLIPS_AT_ONCE


def test_a_dead_workers_clips_are_answered_by_others(files):
    dead = set()

    def once(worker, path):
        if worker == 1 and not dead:
            dead.add(path)
            return True
        return False

    crew = ScriptedCrew(once)
    rows, producer = produced(crew, files)
    assert keys(rows) == everything(files) and not any(row.error for row in rows)
    assert producer.deaths == 1 and crew.started == 3
    again = [names for _, names in crew.given if names[0] in {path.name for path in dead}]
    assert len(again) == 2 and len(again[1]) == 1, "a file that may have killed comes back alone"


def test_a_clip_that_keeps_killing_becomes_an_error_row(files):
    crew = ScriptedCrew(lambda worker, path: path.name == "05.mp4")
    rows, producer = produced(crew, files)
    assert keys(rows) == everything(files)
    failed = {(Path(row.media[0]).name, row.error.type, row.sha256) for row in rows if row.error}
    assert {(name, kind) for name, kind, _ in failed} == {("05.mp4", "EngineError")}
    assert all(len(sha256) == 64 for _, _, sha256 in failed)
    assert producer.deaths == ATTEMPTS


def test_a_cluster_that_only_dies_ends_the_run(files):
    with pytest.raises(EngineError, match="died in a row and none answered"):
        produced(ScriptedCrew(lambda worker, path: True), files * 1, size=1)


def test_no_worker_comes_up(files):
    crew = ScriptedCrew(never_ready={1})
    now = iter(range(0, 10**6, 50))
    producer = CrewProducer(crew, "bundle", {}, 1, clock=lambda: next(now))
    crew.start()
    with pytest.raises(EngineError, match="no worker has come up"):
        list(producer.produce(files, REQUEST, lambda *_: False, threading.Event()))


def test_skipped_rows_are_asked_for_once_and_left_out(files):
    asked = []

    def skip(sha256, path, task):
        asked.append((Path(path).name, task))
        return task == "ave" or path.endswith("03.mp4")

    crew = ScriptedCrew(lambda worker, path: worker == 1 and path.name == "00.mp4")
    rows, _ = produced(crew, files, skip=skip)
    assert sorted(asked) == everything(files)
    assert keys(rows) == [(path.name, "avcap") for path in files if path.name != "03.mp4"]


def test_unreadable_files_cost_no_worker(files, tmp_path):
    rows, _ = produced(ScriptedCrew(), [tmp_path / "gone.mp4", files[0], tmp_path])
    errors = {(Path(row.media[0]).name, row.error.type) for row in rows if row.error}
    assert errors == {("gone.mp4", "MediaError"), (tmp_path.name, "MediaError")} and len(rows) == 6


def test_after_stop_nothing_is_begun(files):
    stop = threading.Event()
    crew = ScriptedCrew()
    producer = CrewProducer(crew, "bundle", {}, 1)
    crew.start()
    rows = []
    for row, _ in producer.produce(files, REQUEST, lambda *_: False, stop):
        rows.append(row)
        stop.set()
    assert crew.halted and len(rows) == 2 and len(crew.given) == 1


def test_an_error_of_the_list_is_raised_after_what_came_before(files):
    def listed():
        yield files[0]
        raise CrabError("the list ended badly")

    rows = []
    producer = CrewProducer(crew := ScriptedCrew(), "bundle", {}, 1)
    crew.start()
    with pytest.raises(CrabError, match="ended badly"):
        for row, _ in producer.produce(listed(), REQUEST, lambda *_: False, threading.Event()):
            rows.append(row)
    assert len(rows) == 2

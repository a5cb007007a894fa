"""Which error rows stay in `rows.jsonl`: none beside a row that says better what became of its file."""

import pytest
from crab_edge_apps._rows import RowFile

from crab_edge.batch import Request
from crab_edge.errors import MediaError
from crab_edge.results import Answer, Timings
from crab_edge.rows import Row, RowError, read_rows

SHA = "a" * 64


@pytest.fixture
def run(tmp_path):
    """run(...) -> a run's row file; files named p, q and r may lie beside its folder."""

    def opened(**options):
        return RowFile(
            tmp_path / "out", bundle="b", engine={"name": "e"}, request=Request(("ave",)), **options
        )

    return opened


@pytest.fixture
def path(tmp_path):
    """path(name, there=True) -> its path, with or without a file there."""

    def made(name, there=True):
        found = tmp_path / name
        found.touch() if there else found.unlink(missing_ok=True)
        return str(found)

    return made


def good(path, sha256=SHA):
    return Row((path,), "ave", sha256, 1.0, Answer("ave", "x", (), Timings()))


def failed(path, sha256=SHA):
    return Row((path,), "ave", sha256, error=RowError.of(MediaError("no")))


def found(rows):
    """(name, content's first letter, whether it is an error) of each row."""
    return [
        (row["media"][0].rpartition("/")[2], (row["sha256"] or "-")[0], "error" in row)
        for row in (rows.rows() if isinstance(rows, RowFile) else read_rows(rows))
    ]


def test_a_file_that_cannot_be_read_for_a_while(run, path, tmp_path):
    p = path("p")
    with run() as rows:
        assert not rows.claim(SHA, p, "ave")
        rows.add(good(p))
    with run(retry_errors=True) as rows:
        assert rows.claim(None, p, "ave"), "it has its row"
        assert not rows.claim(None, path("q"), "ave")
        rows.add(failed(path("q"), None))
    with run() as rows:
        assert rows.claim(SHA, p, "ave") and rows.claim(None, path("q"), "ave")
        assert not rows.claim("b" * 64, path("q"), "ave")
        rows.add(good(path("q"), "b" * 64))
        assert found(rows) == found(tmp_path / "out") == [("p", "a", False), ("q", "b", False)]


def test_a_file_that_comes_back_from_another_path(run, path, tmp_path):
    with run() as rows:
        rows.add(good(path("p")))
        rows.add(failed(path("q", there=False), None))
    path("p", there=False)
    with run() as rows:
        assert rows.claim(SHA, path("q"), "ave") and found(rows) == [("p", "a", False)]
        assert rows.replaced
    assert found(tmp_path / "out") == [("p", "a", False)]


@pytest.mark.parametrize("retried", [good, failed])
def test_an_error_row_of_a_moved_file_gives_way_to_its_retry(run, path, tmp_path, retried):
    with run() as rows:
        rows.add(failed(path("p")))
    path("p", there=False)
    with run() as rows:
        assert rows.claim(SHA, path("q"), "ave") and rows.claim(SHA, path("q"), "ave") and not rows.replaced
    assert found(tmp_path / "out") == [("p", "a", True)], "without a retry the row has moved along"
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    with run(retry_errors=True) as rows:
        assert not rows.claim(SHA, path("q"), "ave")
        rows.add(retried(path("q")))
        both = (tmp_path / "out" / "rows.jsonl").read_bytes()
        assert both.startswith(before) and found(rows) == [("q", "a", retried is failed)] and rows.replaced
    assert found(tmp_path / "out") == [("q", "a", retried is failed)]
    (tmp_path / "out" / "rows.jsonl").write_bytes(both)  # as a kill before the end leaves it
    with run() as rows:
        assert rows.claim(SHA, path("q"), "ave")
    assert found(tmp_path / "out") == [("q", "a", retried is failed)]


def test_equal_files_that_moved_keep_their_error_rows(run, path, tmp_path):
    with run() as rows:
        for name in "pq":
            rows.add(failed(path(name)))
    for name in "pq":
        path(name, there=False)
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    for _ in range(2):
        with run() as rows:
            assert all(rows.claim(SHA, path(name), "ave") for name in "rs")
        assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_copies_keep_error_rows_of_their_own(run, path, tmp_path):
    with run() as rows:
        for name in "pq":
            assert not rows.claim(SHA, path(name), "ave")
            rows.add(failed(path(name)))
    with run(retry_errors=True) as rows:
        assert not rows.claim(SHA, path("q"), "ave")
        rows.add(good(path("q")))
    assert found(tmp_path / "out") == [("p", "a", True), ("q", "a", False)]
    path("p", there=False)
    with run() as rows:
        assert rows.claim(SHA, path("q"), "ave")
        assert not rows.claim(SHA, path("r"), "ave"), "the row that went isn't r's"
    assert found(tmp_path / "out") == [("q", "a", False)]


def test_what_was_asked_otherwise_stays(run, path, tmp_path):
    with RowFile(tmp_path / "out", bundle="other", engine={"name": "e"}, request=Request(("ave",))) as rows:
        rows.add(failed(path("p", there=False)))
        rows.add(failed(path("q", there=False), None))
    with run(retry_errors=True) as rows:
        rows.add(good(path("q")))
    assert found(tmp_path / "out") == [("p", "a", True), ("q", "-", True), ("q", "a", False)]

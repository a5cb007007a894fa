"""The layout of rows: the schema against real rows, names that aren't UTF-8, rows that replace others."""

import dataclasses
import json
import os

import jsonschema
import pytest

from crab_edge import results, rows
from crab_edge.errors import InputError, MediaError
from crab_edge.results import Answer, Box, Caption, Choice, Event, Mask, Points, Timings, Unparsed
from crab_edge.rows import Row, RowError, media_paths, read_rows

ASKED = {
    "bundle": "b/w4@01",
    "question": None,
    "grammar": False,
    "window_s": 10.0,
    "stride_s": 10.0,
    "max_new_tokens": 512,
}
EVERYTHING = (
    Event("dog", 1.0, 2.5, "audio-visual"),
    Box("dog", -1.5, 0, 10, 20, window=(0.0, 10.0)),
    Points("dog", ((1, 2), (3.5, 4))),
    Mask("dog", 4, 3, (2, 10), "GrabCut", window=(5, 15)),
    Choice("yes"),
    Caption("a dog", window=(0, 10)),
    Unparsed("no event"),
)


@pytest.fixture(scope="module")
def valid():
    schema = rows.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda row: not list(validator.iter_errors(json.loads(json.dumps(row))))


def line(row, **more):
    return row.to_json(engine={"name": "fake"}, **ASKED | more)


def answered(*parsed, path="/in/a.mp4", task="ave"):
    answer = Answer(task, "raw", parsed, Timings(tokens=3, total_s=0.5), notices=("odd",))
    return Row((path,), task, "0" * 64, 8.0, answer)


def failed(path="/in/a.mp4", task="ave", sha256=None):
    return Row((path,), task, sha256, error=RowError.of(MediaError("two\nlines")))


def test_rows_with_every_type_of_result_are_valid(valid):
    assert valid(line(answered(*EVERYTHING)))
    assert valid(line(answered(), question="Is there a dog?", grammar=True))
    assert valid(line(failed())) and valid(line(failed(sha256="a" * 64)))
    assert line(failed())["error"] == {"type": "MediaError", "message": "two lines"}


def test_the_schema_refuses_what_is_no_row(valid):
    good, bad = line(answered(*EVERYTHING)), line(failed())
    for name in good:
        assert not valid({key: value for key, value in good.items() if key != name}), name
    for name in bad:
        assert not valid({key: value for key, value in bad.items() if key != name}), name
    assert not valid(good | {"error": bad["error"]})
    assert not valid(good | {"more": 1}) and not valid(good | {"version": 1})
    assert not valid(bad | {"error": {"type": "E", "message": "two\nlines"}})
    for wrong in ({"type": "event", "label": "dog"}, {"type": "song"}, {"type": "choice", "value": 1}):
        assert not valid(good | {"parsed": [wrong]})


def test_the_schema_knows_every_field():
    known = rows.schema()["$defs"]
    shown = {type(result).__name__ for result in EVERYTHING}
    assert shown == {kind.__name__ for kind in results.Result.__args__} - {"MaskFile"}, (
        "truths aren't answers"
    )
    for kind in (*map(type, EVERYTHING), Timings):
        fields = {field.name for field in dataclasses.fields(kind)}
        assert set(known[kind.__name__.lower()]["properties"]) - {"type"} == fields
    top = set(rows.schema()["properties"])
    assert set(line(answered())) | set(line(failed())) | {"media_base64"} == top


def test_names_that_are_not_text_are_kept_exactly(valid):
    name = os.fsdecode(b"/in/\xff'\"\n,=1+1.mp4")
    row = line(answered(path=name))
    assert row["media"] == ["/in/�'\"\n,=1+1.mp4"] and valid(row)
    text = json.dumps(row, ensure_ascii=False)
    assert text.encode("utf-8").count(b"\n") == 0, "one line, and valid UTF-8"
    assert os.fsencode(media_paths(json.loads(text))[0]) == os.fsencode(name)
    error = line(Row((name,), "ave", None, error=RowError.of(MediaError(f"{name}: bad"))))
    assert json.dumps(error, ensure_ascii=False).encode("utf-8") and valid(error)
    assert "media_base64" not in line(answered(path="/in/ü.mp4"))


def write(path, *rows_, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_) + end)


def test_reading_gives_each_row_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    old, new = line(failed()), line(answered())
    again = line(failed(), question="Is it?")
    other = line(failed("/in/b.mp4"))
    write(path, old, other, again, new, end='{"cut')
    assert list(read_rows(tmp_path)) == list(read_rows(path)) == [other, again, new]
    write(path, old, old, old)
    assert list(read_rows(path)) == [old]
    write(path, new, old)
    assert list(read_rows(path)) == [new, old], "an answer is never replaced"


def test_files_that_hold_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="can't be read"):
        list(read_rows(tmp_path))
    for text, words in (
        ('{"my": "data"}\n', "line 1 is no row"),
        (json.dumps(line(failed())) + "\n[]\n", "line 2 is no row"),
        (json.dumps(line(failed()) | {"version": 7}) + "\n", "row version 7, expected 3"),
        (json.dumps(line(failed()) | {"media": 3}) + "\n", "line 1 is no row"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            list(read_rows(path))

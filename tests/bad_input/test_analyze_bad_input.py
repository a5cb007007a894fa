"""What can go wrong in a batch: an error row or a line that says what to do, and nothing written is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest

from crab_edge.batch import Request
from crab_edge.bundle import Bundle
from crab_edge.errors import CrabError, InputError
from crab_edge.rows import Row, RowError, media_paths, read_rows, schema
from crab_edge.session import Model
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

PROTECTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "112233445566778899aabbccddeeff00",
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "good")


@pytest.fixture(scope="module")
def model(bundle):
    opened = Bundle.open(bundle)
    return Model(opened, FakeEngine(opened, "a dog"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media.video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=3, fps=4)


@pytest.fixture
def error_of(model):
    """error_of(path) -> the message of its error row, which is one line and names the file."""

    def run(path):
        (row,) = model.analyze([path], ["avcap"])
        assert row.answer is None and row.error.type == "MediaError", row
        assert "\n" not in row.error.message and Path(path).name in row.error.message
        return row.error.message

    return run


@pytest.fixture
def row_file(tmp_path):
    """row_file(retry_errors=...) -> a row file over tmp_path/out."""
    from crab_edge_apps._rows import RowFile

    def opened(out=tmp_path / "out", **options):
        request = Request(("avcap",))
        return RowFile(out, bundle="b/w4@0", engine={"name": "fake"}, request=request, **options)

    return opened


def failed(path):
    return Row((str(path),), "avcap", None, error=RowError("MediaError", "x" * 200))


def command(clip, out, bundle):
    return ["analyze", clip, "--task", "avcap", "--out", out, "--bundle", bundle]


def test_files_that_are_no_whole_media(error_of, clip, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("Dear Sir or Madam,\n" * 50)
    media.truncated(clip, tmp_path / "cut.mp4")
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.mp4")
    assert "not a media file" in error_of(tmp_path / "text.mp4")
    assert "get a whole copy" in error_of(tmp_path / "cut.mp4") or "missing" in error_of(tmp_path / "cut.mp4")
    assert "no such file" in error_of(tmp_path / "gone.mp4")


def test_protected_media_and_unknown_codecs(error_of, clip, tmp_path):
    protected = media.video(tmp_path / "drm.mp4", seconds=2, fps=4, options=PROTECTION)
    assert "video stream is encrypted (DRM)" in error_of(protected)
    import av

    with av.open(str(tmp_path / "drm.m4a"), "w", format="mp4", options=PROTECTION) as out:
        track = out.add_stream("aac", rate=16000)
        track.layout = "mono"
        media._encode(out, track, media.tone(2.0), 16000, 0.0)
    assert "audio stream is encrypted (DRM)" in error_of(tmp_path / "drm.m4a")
    content = clip.read_bytes()
    for codec in (b"drmi", b"xyz1"):
        (tmp_path / "odd.mp4").write_bytes(content.replace(b"avc1", codec))
        assert "no decoder for its video stream" in error_of(tmp_path / "odd.mp4")


HOSTILE = [
    b"two\nlines.png",
    b"'quote\".png",
    b"-rf.png",
    b"--out.png",
    b"=1+1.png",
    b"@list.png",
    b"*.png",
    b"<script>.png",
    b"a --> b.png",
    b"\xff\xfe.png",
    b"\xff\xfd.png",
    b"\x1b[31m.png",
    b"%s{}.png",
    b" .png",
]


def test_hostile_names(model, row_file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = media.picture(tmp_path / "good.png")
    for number, name in enumerate(HOSTILE):
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.write_bytes(good.read_bytes() + bytes([number]) if number % 2 else b"")
    for _ in range(2):
        with row_file() as rows:
            skip = rows.claim
            for row in model.analyze([folder], ["avcap"], skip=skip):
                rows.add(row)
    lines = (tmp_path / "out" / "rows.jsonl").read_bytes().decode("utf-8").split("\n")
    assert len(lines) == len(HOSTILE) + 1 and lines[-1] == "", "a line each, once"
    for line in lines[:-1]:
        jsonschema.validate(json.loads(line), schema())
    found = {os.fsencode(path): row for row in map(json.loads, lines[:-1]) for path in media_paths(row)}
    assert set(found) == {os.fsencode(folder) + b"/" + name for name in HOSTILE}
    for number, name in enumerate(HOSTILE):
        row = found[os.fsencode(folder) + b"/" + name]
        assert ("raw" in row) == bool(number % 2) and (number % 2 or row["error"]["type"] == "MediaError")
        assert "\n" not in row.get("error", {}).get("message", "")


def run(arguments, limit=resource.RLIM_INFINITY, cwd=ROOT):
    """The command line with a stand-in engine in a process whose files may grow to `limit` bytes."""
    script = "from tests.apps.killed_run import analyze; import sys; sys.exit(analyze(sys.argv[1:]))"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_names_on_the_command_line(clip, tmp_path, bundle):
    """Names that look like options, or that would act on the terminal."""
    shutil.copy(clip, tmp_path / "-x.mp4")
    (tmp_path / "two\nlines\x1b[31m.mp4").write_bytes(b"")
    options = ["analyze", "--task", "avcap", "--out", "out", "--bundle", bundle]
    ran = run([*options, "--", "-x.mp4", "two\nlines\x1b[31m.mp4"], cwd=tmp_path)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    assert "1 answer, 1 error" in ran.stdout and "\x1b" not in ran.stdout
    assert next(Path(row["media"][0]).name for row in read_rows(tmp_path / "out")) == "-x.mp4"
    ran = run([*options, "--", "gone\n\x1b[31m*.mp4"], cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "\x1b" not in ran.stderr


def test_a_full_disk(tmp_path, bundle):
    """The kernel refuses to let the file grow: one line, the rows so far are whole, the next run goes on."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        media.picture(folder / f"{number}.png", width=20 + number)
    assert run(command(folder, tmp_path / "whole", bundle)).returncode == 0
    whole = list(read_rows(tmp_path / "whole"))
    size = (tmp_path / "whole" / "rows.jsonl").stat().st_size
    ran = run(command(folder, out, bundle), limit=size // 2)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert ran.stderr.count("\n") == 1 and "can't be written (File too large); make room" in ran.stderr
    kept = (out / "rows.jsonl").read_bytes()
    assert kept.endswith(b"\n") and 1 <= len(list(read_rows(out))) < 6
    assert run(command(folder, out, bundle)).returncode == 0
    assert (out / "rows.jsonl").read_bytes().startswith(kept)
    assert [row["media"] for row in read_rows(out)] == [row["media"] for row in whole]


def test_a_full_disk_while_old_rows_are_taken_out(row_file, monkeypatch, tmp_path):
    with row_file() as rows:
        rows.add(failed("/in/a.mp4"))
        rows.add(failed("/in/b.mp4"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with row_file(retry_errors=True) as rows:
        assert not rows.claim(None, "/in/a.mp4", "avcap")
        rows.add(failed("/in/a.mp4"))
        monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "out" / "rows.jsonl"
    assert path.read_bytes().count(b"\n") == 3 and len(list(read_rows(path))) == 2
    with pytest.raises(InputError, match="No space left on device"), row_file():
        pass
    assert path.read_bytes().count(b"\n") == 3 and not list(path.parent.glob("*.new"))
    monkeypatch.undo()
    with row_file():
        assert path.read_bytes().count(b"\n") == 2


def test_a_write_that_fails_takes_its_half_line_back(row_file, monkeypatch, tmp_path):
    real = os.write
    with row_file() as rows:
        rows.add(failed("/in/a.mp4"))

        def half(number, content):
            if len(content) > 100:
                return real(number, content[:100])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(CrabError, match="No space left"):
            rows.add(failed("/in/b.mp4"))
        monkeypatch.undo()
        rows.add(failed("/in/c.mp4"))
    assert [row["media"][0] for row in read_rows(tmp_path / "out")] == ["/in/a.mp4", "/in/c.mp4"]


def test_output_that_cannot_be_written(row_file):
    """A folder, and a row file, that belong to somebody else."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "closed").mkdir()
        (base / "rows").mkdir()
        (base / "rows" / "rows.jsonl").touch()
        base.chmod(0o755)
        (base / "closed").chmod(0o555)
        (base / "rows").chmod(0o777)
        (base / "rows" / "rows.jsonl").chmod(0o444)
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)
        try:
            for out in (base / "closed", base / "closed" / "deeper", base / "rows"):
                with pytest.raises(InputError, match=r"can't be written \(Permission denied\).*--out"):
                    row_file(out).__enter__()
        finally:
            if as_root:
                os.seteuid(0)
        assert (
            not (base / "closed" / "deeper").exists() and (base / "rows" / "rows.jsonl").read_bytes() == b""
        )


def test_a_second_run_on_one_output(row_file, clip, bundle, tmp_path):
    with row_file() as rows:
        rows.add(failed("/in/a.mp4"))
        before = (tmp_path / "out" / "rows.jsonl").read_bytes()
        ran = run(command(clip, tmp_path / "out", bundle))
        assert ran.returncode == 2 and "another run is writing it" in ran.stderr
        assert ran.stderr.count("\n") == 1 and (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    assert run(command(clip, tmp_path / "out", bundle)).returncode == 0
    assert len(list(read_rows(tmp_path / "out"))) == 2

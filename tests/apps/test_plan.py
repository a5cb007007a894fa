"""`crab-edge plan` as a user types it."""

import json

import pytest
from crab_edge_apps.cli import run
from crab_edge_apps.plan import _bytes

from crab_edge.errors import InputError


def test_it_says_what_fits(capsys):
    assert run(["plan", "7b", "--memory", "12GB", "--block", "128"]) == 0
    said = capsys.readouterr().out
    assert "6.67 GB on disk" in said and "fits" in said
    for part in ("decoder", "adapters", "head", "embedding", "vision", "audio", "scales", "cache"):
        assert part in said


def test_it_names_the_nearest_plan(capsys):
    options = ["--length", "60", "--window", "60", "--frames", "60", "--memory", "6.5GB"]
    assert run(["plan", "7b", *options, "--json"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert not record["fits"] and record["nearest"]["fits"]
    assert record["nearest"]["memory_bytes"]["peak"] <= 6.5e9 and record["nearest"]["changes"]
    assert run(["plan", "7b", "--memory", "1GB"]) == 3
    assert "no plan fits" in capsys.readouterr().out


def test_a_long_window_has_the_frames_that_ask_shows(capsys):
    assert run(["plan", "7b", "--length", "60", "--window", "60", "--memory", "24GB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["frames"] == 60 and record["tokens"]["video"] == 1920 and record["tokens"]["audio"] == 1500


def test_directories_and_bundles(tmp_path, capsys):
    from crab_edge.bundle import default_bundle

    sizes = {
        "text_config": {"hidden_size": 64, "num_attention_heads": 2},
        "vision_config": {},
        "audio_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert run(["plan", str(tmp_path), "--memory", "64GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == tmp_path.name
    assert run(["plan", str(default_bundle()), "--memory", "1GB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "crab-nano" and record["kv_dtype"] == "float32"
    assert run(["plan", str(default_bundle()), "--block", "128"]) == 2
    assert "recipe is what it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["9b"],
        ["7b", "--memory", "lots"],
        ["7b", "--kv", "int8"],
        ["7b", "--bits", "3"],
        ["7b", "--measure"],
        ["7b", "--length", "nan"],
        ["7b", "--length", "inf"],
        ["7b", "--window", "300"],
        ["7b", "--experts", "foo"],
        ["7b", "--answer", "-1"],
        ["."],
    ],
)
def test_bad_input(arguments, capsys):
    assert run(["plan", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sizes_as_people_write_them():
    assert _bytes("8GB") == 8_000_000_000 == _bytes("8") == _bytes(" 8 g ")
    assert _bytes("512MiB") == 512 << 20 and _bytes("7.5gib") == int(7.5 * (1 << 30))
    with pytest.raises(InputError):
        _bytes("0GB")


def test_predicted_and_measured(capsys):
    """The packaged bundle in processes of their own: the prediction is within the tolerance."""
    pytest.importorskip("onnxruntime")
    assert run(["plan", "nano", "--measure", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["low_memory"] for row in rows] == [False, True]
    assert all(abs(row["error"]) <= 0.10 for row in rows)
    assert rows[1]["measured"] < rows[0]["measured"]

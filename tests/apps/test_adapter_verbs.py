"""`import-adapter` and `export-adapter` on the command line: what is printed, and one line for bad input."""

import json

import pytest

pytest.importorskip("peft")

from crab_edge_apps.cli import run

from tests.official import ALPHA, RANK, make_official_adapter, make_official_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    base = make_official_dir(folder / "base")
    make_official_adapter(base, folder / "finetune_weights.bin")
    return folder


@pytest.fixture
def command(made, capsys):
    """command(words..., base=True) runs one line: (exit code, stdout, stderr)."""

    def call(*words, base=True):
        line = [str(word) for word in words] + (["--base", str(made / "base")] if base else [])
        code = run(line)
        return code, *capsys.readouterr()

    return call


def test_there_and_back(made, command, tmp_path):
    sizes = ["--rank", RANK, "--alpha", ALPHA]
    code, out, err = command("import-adapter", made / "finetune_weights.bin", "--out", tmp_path / "a", *sizes)
    assert (code, err) == (0, "")
    assert "26 linears, 130 tensors" in out and "rank 8, 3 experts, alpha 16" in out
    assert "vision tower: 6 linears, all with zero experts" in out and "leaves out" in out
    assert "decoder: 14 linears\n" in out
    code, out, _ = command("export-adapter", tmp_path / "a", "--out", tmp_path / "b.bin", "--json")
    report = json.loads(out)
    assert code == 0 and report["idle_parts"] == ["visual", "audio_tower"] and report["parameters"] > 10_000
    assert (tmp_path / "b.bin").stat().st_size == pytest.approx(
        (made / "finetune_weights.bin").stat().st_size, rel=0.1
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import-adapter", "FILE", "--out", "OUT"], "--rank 8"),
        (["import-adapter", "nowhere.bin", "--out", "OUT"], "nowhere.bin"),
        (["export-adapter", "nowhere", "--out", "OUT"], "adapter_config.json"),
        (["import-adapter", "FILE", "--out", "OUT", "--size", "7b"], "one of them"),
    ],
)
def test_bad_input_is_one_line(made, command, tmp_path, words, message):
    places = {"FILE": made / "finetune_weights.bin", "OUT": tmp_path / "out"}
    code, out, err = command(*[places.get(word, word) for word in words])
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())

"""The trace as a value: its checks, means and files."""

import json

import numpy as np
import pytest

from crab_edge.errors import InputError
from crab_edge.router import RouterTrace, check_path


def trace(tokens=("a", "", "", "é\n"), modality=("text", "video", "audio", "answer"), seed=0, **more):
    logits = np.random.default_rng(seed).normal(size=(2, len(tokens), 3))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    layers = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj")
    return RouterTrace(layers, weights.astype(np.float32), tokens, modality, **more)


def test_means_are_taken_over_a_modalitys_tokens():
    weights = np.array([[[1, 0], [0, 1], [0, 1], [0.5, 0.5]]], np.float32)
    made = RouterTrace(("l",), weights, ("", "", "x", ""), ("video", "video", "answer", "audio"))
    means = made.mean_by_modality()
    assert list(means) == ["video", "audio", "answer"]
    np.testing.assert_array_equal(means["video"], [[0.5, 0.5]])
    np.testing.assert_array_equal(means["answer"], [[0, 1]])
    assert means["audio"].dtype == np.float32
    assert made.summary() == {
        "layers": 1,
        "tokens": 4,
        "experts": 2,
        "mean_by_modality": {"video": [0.5, 0.5], "audio": [0.5, 0.5], "answer": [0.0, 1.0]},
    }


def test_npz_gives_the_trace_back(tmp_path):
    made = trace(windows=(0, 2))
    made.save(tmp_path / "t.npz")
    again = RouterTrace.load_npz(tmp_path / "t.npz")
    np.testing.assert_array_equal(again.weights, made.weights)
    for name in ("layers", "tokens", "modality", "windows"):
        assert getattr(again, name) == getattr(made, name)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_jsonl_has_a_line_a_token(tmp_path):
    made = trace()
    made.save(tmp_path / "t.jsonl")
    header, *lines = map(json.loads, (tmp_path / "t.jsonl").read_text("utf-8").splitlines())
    assert header["layers"] == list(made.layers) and header["experts"] == 3 and header["windows"] == [0]
    assert [line["token"] for line in lines] == [0, 1, 2, 3]
    assert [line["text"] for line in lines] == list(made.tokens)
    assert [line["modality"] for line in lines] == list(made.modality)
    np.testing.assert_allclose(
        np.array([line["weights"] for line in lines]).swapaxes(0, 1), made.weights, atol=6e-6
    )


def test_windows_are_joined():
    parts = [trace(), trace(seed=1), trace(seed=2)]
    joined = RouterTrace.join([RouterTrace.join(parts[:2]), parts[2]])
    assert joined.windows == (0, 4, 8) and joined.tokens == parts[0].tokens * 3
    np.testing.assert_array_equal(joined.weights[:, 8:], parts[2].weights)
    other = RouterTrace(("x", "y"), parts[0].weights, parts[0].tokens, parts[0].modality)
    with pytest.raises(InputError, match="different models"):
        RouterTrace.join([parts[0], other])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": ("a",)}, "1 tokens"),
        ({"modality": ("text",) * 3}, "3 modalities"),
        ({"modality": ("text", "smell", "text", "text")}, "smell"),
        ({"layers": ()}, "0 layers"),
        ({"weights": np.zeros((2, 4, 3))}, "float64"),
        ({"windows": (1,)}, "windows"),
        ({"windows": (0, 4)}, "windows"),
        ({"windows": (0, 2, 2)}, "windows"),
    ],
)
def test_sizes_must_fit(change, words):
    made = trace()
    values = {name: getattr(made, name) for name in ("layers", "weights", "tokens", "modality", "windows")}
    with pytest.raises(InputError, match=words):
        RouterTrace(**{**values, **change})


def test_files_that_are_no_trace(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    np.savez(tmp_path / "pickled.npz", version=np.array([{}], object))
    for name in ("text.npz", "other.npz", "pickled.npz", "missing.npz"):
        with pytest.raises(InputError, match=f"{name}: not a router trace"):
            RouterTrace.load_npz(tmp_path / name)


def test_places_that_are_refused(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    for path, words in (("a.txt", ".npz or .jsonl"), ("no/a.npz", "doesn't exist"), ("folder.npz", "folder")):
        with pytest.raises(InputError, match=words):
            check_path(tmp_path / path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    trace().save(tmp_path / "t.jsonl")
    old = (tmp_path / "t.jsonl").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crab_edge.staging.os.replace", fail)
    with pytest.raises(InputError, match="No space left"):
        trace(seed=1).save(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]

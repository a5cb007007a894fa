"""Crab+'s adapter file: exact both ways, refused with names and numbers where it isn't what it must be."""

import json
import os
import pickle
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from crab_edge.errors import InputError, ModelError
from crab_edge.model import load_adapter, load_base, official_config, zero_linears
from crab_edge.model.official import export_adapter, import_adapter
from tests.official import ALPHA, RANK, hollow_adapter, make_official_adapter, make_official_dir

SIZES = {"rank": RANK, "alpha": ALPHA}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_official_dir(tmp_path_factory.mktemp("official") / "base")


@pytest.fixture(scope="module")
def file(base, tmp_path_factory):
    return make_official_adapter(base, tmp_path_factory.mktemp("official") / "finetune_weights.bin")


@pytest.fixture
def saved(tmp_path):
    """saved(state) writes it with torch.save and gives the file."""

    def save(state, **options):
        path = tmp_path / "file.bin"
        torch.save(state, path, **options)
        return path

    return save


@pytest.fixture(scope="module")
def hollow_7b():
    return hollow_adapter("7b")


def tensors_of(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("size", "linears", "tensors", "parameters"),
    [("7b", 388, 1940, 870_480_512), ("3b", 444, 2220, 694_355_584)],
)
def test_true_sizes(size, linears, tensors, parameters):
    state = hollow_adapter(size)
    assert len(state) == tensors and sum(t.numel() for t in state.values()) == parameters
    assert len({name.rsplit(".", 2)[0] for name in state}) == linears
    names = list(state)
    first = "base_model.model.audio_tower.layers.0.self_attn"
    parts = ("lora_route", "lora_A", "lora_B0", "lora_B1", "lora_B2")
    assert names[:5] == [f"{first}.k_proj.{part}.weight" for part in parts]
    assert names[5].startswith(f"{first}.v_proj") and names[10].startswith(f"{first}.q_proj")
    last = official_config(size).text_config.num_hidden_layers - 1
    assert names[-1] == f"base_model.model.model.layers.{last}.mlp.down_proj.lora_B2.weight"
    assert "base_model.model.visual.blocks.31.mlp.gate_proj.lora_route.weight" in state


def test_round_trip_is_exact(base, file, tmp_path):
    report = import_adapter(file, tmp_path / "adapter", base=base, **SIZES)
    assert (sum(report.linears.values()), report.tensors, report.dtypes) == (26, 130, {"bfloat16": 130})
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    export_adapter(tmp_path / "adapter", tmp_path / "again.bin", base=base)
    original, again = tensors_of(file), tensors_of(tmp_path / "again.bin")
    assert list(original) == list(again)
    for name, tensor in original.items():
        assert again[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(again[name], tensor), name
    # One record for each tensor, of its own size: no storage of a neighbour goes along.
    with zipfile.ZipFile(tmp_path / "again.bin") as archive:
        records = sorted(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    assert records == sorted(tensor.nbytes for tensor in original.values())


def test_the_imported_adapter_is_the_official_formula(base, file, tmp_path):
    import_adapter(file, tmp_path / "adapter", base=base, **SIZES)
    model = load_adapter(load_base(base), tmp_path / "adapter").get_base_model()
    name = "model.layers.1.mlp.up_proj"
    state = {n.rsplit(".", 2)[-2]: t.float() for n, t in tensors_of(file).items() if f"{name}." in n}
    layer = model.model.language_model.layers[1].mlp.up_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    gates = torch.softmax(x @ state["lora_route"].T, dim=-1)
    wanted = layer.base_layer(x)
    for i in range(3):
        wanted = wanted + gates[:, i : i + 1] * (x @ state["lora_A"].T @ state[f"lora_B{i}"].T) * ALPHA / RANK
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1e-2


def test_zero_towers_are_reported_and_recorded(base, file, tmp_path):
    report = import_adapter(file, tmp_path / "adapter", base=base, **SIZES)
    assert report.idle_parts == ["visual", "audio_tower"]
    assert report.zero_linears == {"visual": 6, "audio_tower": 6}
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        assert json.loads(tensors.metadata()["idle_parts"]) == report.idle_parts
    assert len(zero_linears(load_adapter(load_base(base), tmp_path / "adapter"))) == 12
    drawn = make_official_adapter(base, tmp_path / "drawn.bin", towers=True)
    assert import_adapter(drawn, tmp_path / "b", base=base, **SIZES).idle_parts == []


@pytest.mark.parametrize(
    "prefix", ["", "thinker.", "module.", "base_model.model.thinker.", "module.base_model.model."]
)
def test_other_prefixes(base, file, saved, tmp_path, prefix):
    state = {prefix + n.removeprefix("base_model.model."): t for n, t in tensors_of(file).items()}
    import_adapter(saved(state), tmp_path / "a", base=base, **SIZES)
    import_adapter(file, tmp_path / "b", base=base, **SIZES)
    ours, wanted = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[n], wanted[n]) for n in ours)


def test_the_same_key_under_two_prefixes(base, file, saved, tmp_path):
    state = tensors_of(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    state["thinker." + name.removeprefix("base_model.model.")] = state[name]
    with pytest.raises(ModelError, match="twice"):
        import_adapter(saved(state), tmp_path / "out", base=base, **SIZES)


def test_everything_that_does_not_fit_is_listed(base, file, saved, tmp_path):
    state = tensors_of(file)
    missing = [n for n in state if "layers.1.self_attn" in n and "lora_B2" in n and ".model.layers" in n]
    assert len(missing) == 4
    for name in missing:
        del state[name]
    short = "base_model.model.model.layers.0.mlp.up_proj.lora_B0.weight"
    state[short] = state[short][:-1].clone()
    for i in range(9):
        state[f"base_model.model.model.layers.0.extra_{i}.lora_A.weight"] = torch.zeros(2, 2)
    with pytest.raises(ModelError) as raised:
        import_adapter(saved(state), tmp_path / "out", base=base, **SIZES)
    message = str(raised.value)
    assert "of 130 expected weights" in message and "\n" not in message
    assert f"4 missing: {missing[0]}" in message and all(name in message for name in missing)
    assert f"1 misshapen: {short} is [95, 8], expected [96, 8]" in message
    assert "9 unknown" in message and "extra_0" in message and "and 4 more" in message
    assert not (tmp_path / "out").exists()


def test_one_missing_key_at_true_size(hollow_7b, saved, tmp_path):
    state = dict(hollow_7b)
    del state["base_model.model.visual.blocks.17.mlp.down_proj.lora_route.weight"]
    for options in ({}, {"size": "7b"}):
        with pytest.raises(ModelError, match=r"of 1,940 .* 1 missing: .*visual\.blocks\.17\.mlp\.down_proj"):
            import_adapter(saved(state), tmp_path / "out", **options)


def test_wrong_base_is_named_with_both_sizes(base, hollow_7b, saved, tmp_path):
    path = saved(hollow_7b)
    sizes = r"28 decoder layers of width 3584 \(Qwen2\.5-Omni-7B\)"
    with pytest.raises(ModelError, match=rf"{sizes}, but the base has 36 .* 2048 \(Qwen2\.5-Omni-3B\)"):
        import_adapter(path, tmp_path / "out", size="3b")
    with pytest.raises(ModelError, match=rf"{sizes}, but the base has 2 decoder layers of width 64"):
        import_adapter(path, tmp_path / "out", base=base)
    with pytest.raises(InputError, match="one of them"):
        import_adapter(path, tmp_path / "out", base=base, size="7b")
    with pytest.raises(InputError, match="7b or 3b"):
        import_adapter(path, tmp_path / "out", size="72b")


def test_an_unknown_size_needs_its_base(file, tmp_path):
    with pytest.raises(ModelError, match=r"2 decoder layers of width 64.*--base"):
        import_adapter(file, tmp_path / "out", **SIZES)


def test_other_rank_or_number_of_experts(base, file, tmp_path):
    with pytest.raises(ModelError, match=r"rank 8 and 3 experts, expected rank 128 and 3.*--rank 8"):
        import_adapter(file, tmp_path / "out", base=base)
    four = make_official_adapter(base, tmp_path / "four.bin", experts=4)
    with pytest.raises(ModelError, match="rank 8 and 4 experts"):
        import_adapter(four, tmp_path / "out", base=base, **SIZES)
    assert import_adapter(four, tmp_path / "out", base=base, experts=4, **SIZES).experts == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_route", "lora_A", "lora_B1"])
def test_nan_and_infinity(base, file, saved, tmp_path, value, part):
    state = tensors_of(file)
    name = f"model.layers.1.self_attn.o_proj.{part}.weight"
    state[f"base_model.model.{name}"][1, 2] = value
    with pytest.raises(ModelError, match=rf"layers\.1\.self_attn\.o_proj\.{part}.* 1 of "):
        import_adapter(saved(state), tmp_path / "out", base=base, **SIZES)
    assert not (tmp_path / "out").exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_unrun(base, file, saved, tmp_path, zipped):
    state = {**tensors_of(file), "extra": Payload(tmp_path / "ran")}
    path = saved(state, _use_new_zipfile_serialization=zipped)
    words = "would call .*system" if zipped else "old format"
    with pytest.raises(ModelError, match=words) as raised:
        import_adapter(path, tmp_path / "out", base=base, **SIZES)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_other_files(base, file, saved, tmp_path):
    def refuse(path, words):
        with pytest.raises(ModelError, match=words) as raised:
            import_adapter(path, tmp_path / "out", base=base, **SIZES)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)

    state = tensors_of(file)
    refuse(saved(state, _use_new_zipfile_serialization=False), "old format")
    refuse(saved([state]), "holds a list")
    refuse(saved({"state_dict": state}), "state_dict is a dict")
    refuse(saved({n: t.to(torch.int8) for n, t in state.items()}), "is int8")
    whole = file.read_bytes()
    path = tmp_path / "odd.bin"
    path.write_bytes(whole[: len(whole) // 2])
    refuse(path, "truncated")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(path, "LFS")
    path.write_bytes(pickle.dumps({}))
    refuse(path, "old format")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")
    refuse(path, "not a file of torch.save")
    refuse(tmp_path / "nowhere.bin", "No such file")
    refuse(tmp_path, "directory")


def test_views_are_refused_before_they_are_unfolded(hollow_7b, saved, tmp_path):
    with pytest.raises(ModelError, match="stored in order"):
        import_adapter(saved(hollow_7b), tmp_path / "out")


def test_existing_output_stays(base, file, tmp_path):
    out = tmp_path / "out"
    import_adapter(file, out, base=base, **SIZES)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="--overwrite"):
        import_adapter(file, out, base=base, **SIZES)
    broken = tmp_path / "broken.bin"
    broken.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError):
        import_adapter(broken, out, base=base, overwrite=True, **SIZES)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    import_adapter(file, out, base=base, overwrite=True, **SIZES)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="stays"):
        import_adapter(file, tmp_path / "thesis", base=base, overwrite=True, **SIZES)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@contextmanager
def full_disk():
    """Files can't grow beyond 20 kB, as on a disk that fills up half-way; not even pytest's own output."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_half_way(base, file, tmp_path):
    out = tmp_path / "deep" / "adapter"
    import_adapter(file, tmp_path / "whole", base=base, **SIZES)
    before = sorted(tmp_path.rglob("*"))
    with full_disk(), pytest.raises(InputError, match="can't be written"):
        import_adapter(file, out, base=base, **SIZES)
    with full_disk(), pytest.raises(InputError, match="can't be written"):
        export_adapter(tmp_path / "whole", tmp_path / "deep" / "x.bin", base=base)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_space_is_known_before(base, file, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("crab_edge.staging.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="free"):
        import_adapter(file, tmp_path / "out", base=base, **SIZES)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_towers_gets_idle_ones(base, tmp_path):
    """What this project trains with frozen encoders, in the form that the official loader expects."""
    from crab_edge.model import ILoRAConfig, add_adapter, save_adapter

    config = ILoRAConfig(r=RANK, lora_alpha=ALPHA, init_weights=False)
    save_adapter(add_adapter(load_base(base), config, towers=False), tmp_path / "decoder")
    report = export_adapter(tmp_path / "decoder", tmp_path / "out.bin", base=base)
    assert report.drawn_linears == {"visual": 6, "audio_tower": 6} and report.idle_parts == [
        "visual",
        "audio_tower",
    ]
    state = tensors_of(tmp_path / "out.bin")
    assert len(state) == 130
    assert not any(t.any() for n, t in state.items() if "visual" in n and "lora_B" in n)
    assert all(t.any() for n, t in state.items() if "visual" in n and "lora_A" in n)
    assert import_adapter(tmp_path / "out.bin", tmp_path / "again", base=base, **SIZES).tensors == 130


def test_adapters_that_the_official_code_could_not_load(base, file, tmp_path):
    from crab_edge.model import ILoRAConfig, add_adapter, save_adapter

    for targets, words in ((["q_proj"], "fewer"), (["q_proj", "fc1"], "more")):
        config = ILoRAConfig(r=2, lora_alpha=4, target_modules=targets)
        save_adapter(add_adapter(load_base(base), config), tmp_path / words)
        with pytest.raises(ModelError, match=words):
            export_adapter(tmp_path / words, tmp_path / "out.bin", base=base)
    import_adapter(file, tmp_path / "adapter", base=base, **SIZES)
    with pytest.raises(ModelError, match=r"Qwen2\.5-Omni-7B"):
        export_adapter(tmp_path / "adapter", tmp_path / "out.bin", size="7b")
    assert not (tmp_path / "out.bin").exists()

"""The GPU benchmark's logic, dry on a decoder of a few kilobytes; no figure is looked at."""

import dataclasses
import json

import pytest

from crab_edge.bundle import Bundle, default_bundle
from crab_edge.errors import CheckError, CrabError, InputError
from crab_edge.shape import KNOWN, AdapterShape

torch = pytest.importorskip("torch")
from crab_edge_apps import _bench_gpu, _bench_gpu_bars, _bench_gpu_card  # noqa: E402

SMALL = dataclasses.replace(
    KNOWN["nano"],
    hidden=64,
    intermediate=96,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    vocab=80,
    adapter=AdapterShape(32, 3),
)
SETTINGS = _bench_gpu.settings("cpu", 1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    return _bench_gpu.measure([SMALL], ["nano"], SETTINGS, _bench_gpu_card.open_card("cpu"))


def test_every_contender_is_right_and_has_its_row(measured):
    (shape,) = measured["shapes"]
    assert shape["wrong"] == {} and shape["skipped"] == {}
    rows = {(row["part"], row["contender"]): row for row in shape["rows"]}
    eager, graph = _bench_gpu_bars.engine("residual4x2")
    everybody = {
        _bench_gpu_bars.BASE_EAGER,
        _bench_gpu_bars.BASE,
        _bench_gpu_bars.OFFICIAL_EAGER,
        _bench_gpu_bars.OFFICIAL_GRAPH,
        eager,
        graph,
        *_bench_gpu_bars.engine("unfolded8"),
    }
    for part in ("qkv", "o", "gate_up", "down"):
        assert {name for where, name in rows if where == part} == everybody
        assert (f"{part} product", graph) in rows and (f"{part} route", graph) in rows
    for part in ("layer decode", "decode", "layer prefill", "prefill"):
        assert {name for where, name in rows if where == part} == {
            *everybody,
            _bench_gpu_bars.compiled("residual4x2"),
        }
    for row in rows.values():
        assert 0 < row["error"] < 0.05 and row["seconds"] > 0 and row["in_cache"]
        assert row["gigabytes_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    json.dumps(measured)


def test_bytes_are_those_of_the_weights(measured):
    rows = {(row["part"], row["contender"]): row for row in measured["shapes"][0]["rows"]}
    graph = _bench_gpu_bars.engine("residual4x2")[1]
    # down: [64, 96] at 4 bits beside two planes of [64, 96], blocks of 32 with float16 scales.
    product = rows["down product", graph]
    assert product["bytes"] == 64 * 3 * 3 * (16 + 2)
    assert product["over_base"]["bytes"] == 3
    assert rows["down route", graph]["bytes"] == 35 * 3 * (32 + 2)
    # bf16: W, A, R, and three experts.
    official = rows["down", _bench_gpu_bars.OFFICIAL_EAGER]
    assert official["bytes"] == 2 * (64 * 96 + 35 * 96 + 3 * 64 * 32)
    # 2 layers, keys and values of 12 + 1 tokens; a head of 8 bits.
    step, layer = rows["decode", graph], rows["layer decode", graph]
    assert step["bytes"] - 2 * layer["bytes"] == 80 * 2 * (32 + 2)
    groups = sum(rows[part, graph]["bytes"] for part in ("qkv", "o", "gate_up", "down"))
    assert layer["bytes"] == groups + 2 * 13 * 32 * 2


def test_the_reference_is_the_formula():
    from crab_edge_apps import _bench_gpu_official, _bench_gpu_weights

    from crab_edge.ilora import reference
    from crab_edge.lowbit import QTensor, dequantize

    model = _bench_gpu_weights.random_model(SMALL, "residual4x2", CPU)
    weights = model.group(1, "gate_up")
    x = model.hidden(3)

    def floats(stored):
        host = QTensor(stored.q.numpy(), stored.scales.numpy(), stored.bits, stored.block, stored.shape)
        return dequantize(host)

    stack = floats(weights.route)
    for i, (linear, y) in enumerate(
        zip(weights.linears, _bench_gpu_official.reference(model, weights, x), strict=True)
    ):
        A, R = stack[i * 35 : i * 35 + 32], stack[i * 35 + 32 : (i + 1) * 35]
        up = sum(floats(plane) for plane in linear.planes)
        expected = reference.ilora_linear(
            x.numpy(), floats(linear.base), None, A, R, [up[:, j * 32 : (j + 1) * 32] for j in range(3)], 1.0
        )
        torch.testing.assert_close(y.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    official = _bench_gpu_official.OfficialGroup(model, weights, torch.float32)(x)
    for y, right in zip(official, _bench_gpu_official.reference(model, weights, x), strict=True):
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


def test_every_layer_has_its_own_bytes_and_a_seed_gives_them_again():
    from crab_edge_apps import _bench_gpu_weights

    model = _bench_gpu_weights.random_model(SMALL, "plane4", CPU)
    first, second, again = model.group(0, "o"), model.group(1, "o"), model.group(0, "o")
    assert torch.equal(first.linears[0].base.q, again.linears[0].base.q)
    assert not torch.equal(first.linears[0].base.q, second.linears[0].base.q)
    other = dataclasses.replace(model, seed=1).group(0, "o")
    assert not torch.equal(first.linears[0].base.q, other.linears[0].base.q)
    # A decoder without adapters has the same base.
    bare = dataclasses.replace(model, experts=None).group(0, "o")
    assert torch.equal(first.linears[0].base.q, bare.linears[0].base.q) and bare.route is None


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    from crab_edge_apps import _bench_gpu_kernels

    right = _bench_gpu_kernels.low_bit

    def wrong(stored, bias=None):
        made = right(stored, bias)
        return dataclasses.replace(made, scales=made.scales * 1.5) if stored.bits == 8 else made

    monkeypatch.setattr(_bench_gpu_kernels, "low_bit", wrong)
    # Tracing is the other tests' matter.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(_bench_gpu.KNOWN, "nano", SMALL)
    settings = dataclasses.replace(SETTINGS, forms=("residual4x2",))
    with pytest.raises(
        CrabError, match="residual4x2, torch engine, CUDA graph, down route: relative error 0"
    ):
        _bench_gpu.command(["nano"], settings, "cpu", as_json=True)
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    timed = {(row["part"], row["contender"]) for row in shape["rows"]}
    graph = _bench_gpu_bars.engine("residual4x2")[1]
    # Routes and the head are wrong, products aren't.
    assert ("down route", graph) not in timed and ("decode", graph) not in timed
    assert ("down product", graph) in timed and ("decode", _bench_gpu_bars.OFFICIAL_EAGER) in timed


def test_a_kernel_that_does_not_launch_is_named(monkeypatch):
    from crab_edge_apps import _bench_gpu_contenders, _bench_gpu_parts, _bench_gpu_weights

    def fail():
        raise RuntimeError("no kernel image\nand more")

    card = _bench_gpu_card.open_card("cpu")
    model = _bench_gpu_weights.random_model(SMALL, "plane4", CPU)
    inputs = _bench_gpu_parts.Inputs(model, torch.bfloat16, 4, 2)
    field = _bench_gpu_contenders.Field(inputs, card, lambda what, done, of: None, {}, {})
    part = _bench_gpu_parts.Part("decode", fail, lambda: [], 1)
    assert _bench_gpu_contenders._entry("somebody", part, model, True, field) is None
    assert field.wrong == {"somebody, decode": "RuntimeError: no kernel image"} and field.skipped == {}


def test_what_does_not_fit_is_named(monkeypatch):
    from crab_edge_apps import _bench_gpu_contenders, _bench_gpu_official, _bench_gpu_weights
    from crab_edge_apps._bench_gpu_parts import Inputs

    model = _bench_gpu_weights.random_model(SMALL, "plane4", CPU)
    bare = dataclasses.replace(model, experts=None)
    card = _bench_gpu_card.open_card("cpu")
    needed = _bench_gpu_official.official_bytes(model)
    monkeypatch.setattr(_bench_gpu_card.Card, "free_bytes", lambda self: needed - 1)
    field = _bench_gpu_contenders.Field(
        Inputs(bare, torch.bfloat16, 4, 2), card, lambda what, done, of: None, {}, {}
    )
    made = _bench_gpu_contenders.contenders([model], bare, field)
    assert list(field.skipped) == [_bench_gpu_bars.OFFICIAL_GRAPH]
    assert "0.0 GB of memory" in field.skipped[_bench_gpu_bars.OFFICIAL_GRAPH]
    assert _bench_gpu_bars.OFFICIAL_GRAPH not in {one.graph for one in made} and len(made) == 3


@pytest.fixture
def few_steps(monkeypatch):
    from crab_edge_apps import _bench_gpu_engines

    monkeypatch.setattr(_bench_gpu_engines, "_STEPS", 1)
    monkeypatch.setattr(_bench_gpu_engines, "_CALLS", 1)
    return _bench_gpu_engines


def test_engines_run_a_bundle(few_steps, capsys):
    settings = dataclasses.replace(SETTINGS, context=6, prefill=4)
    _bench_gpu.command([], settings, "cpu", bundle=default_bundle())
    assert "not run: tensorrt" in capsys.readouterr().out
    _bench_gpu.command([], settings, "cpu", bundle=default_bundle(), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["shapes"] == [] and result["engines"]["wrong"] == {}
    rows = {(row["part"], row["contender"]): row for row in result["engines"]["rows"]}
    assert set(rows) == {(part, name) for part in ("decode", "prefill") for name in ("torch", "onnxruntime")}
    assert rows["decode", "torch"]["error"] < 1e-4 < rows["decode", "onnxruntime"]["error"] < 0.1


def test_an_engine_that_answers_otherwise_is_not_timed(few_steps, monkeypatch):
    create = few_steps.engines.create

    def other(name, bundle, **options):
        engine = create(name, bundle, **options)
        if name == "onnxruntime":
            forward = engine.forward
            engine.forward = lambda embeds, positions: forward(embeds, positions)[::-1]
        return engine

    monkeypatch.setattr(few_steps.engines, "create", other)
    card = _bench_gpu_card.open_card("cpu")
    sizes = {"rounds": 1, "context": 3, "prefill": 2, "progress": lambda what, done, of: None}
    result = few_steps.measure(Bundle.open(default_bundle()), card, **sizes)
    assert set(result["wrong"]) == {"onnxruntime"}
    assert {row["contender"] for row in result["rows"]} == {"torch"}


def fake_row(part, contender, rounds, size=1e9, over=None):
    return _bench_gpu_bars.row(part, contender, rounds, size, 2e12, over_base=over)


def test_bars():
    graph = _bench_gpu_bars.engine("residual4x2")[1]
    rows = [
        fake_row("decode", graph, [1e-3, 2e-3, 1e-3], 1.2e9, {"bytes": 1.2}),
        fake_row("decode", _bench_gpu_bars.BASE, [0.8e-3, 1.6e-3, 0.8e-3]),
        fake_row("decode", _bench_gpu_bars.OFFICIAL_EAGER, [9e-3, 10e-3, 9e-3]),
        fake_row("decode", _bench_gpu_bars.OFFICIAL_GRAPH, [1.5e-3, 3e-3, 1.4e-3]),
        fake_row("gate_up product", graph, [0.7e-3, 0.7e-3, 0.8e-3]),
    ]
    eager, compiled, gate_up, down, step, bytes_ = _bench_gpu_bars.bars(rows, "residual4x2", "7b")
    assert eager["value"] == pytest.approx(9) and eager["met"] is True
    assert eager["spread"] == pytest.approx([5, 9])
    assert compiled["value"] == pytest.approx(1.5) and compiled["met"] is False
    assert gate_up["value"] == pytest.approx(1e9 / 0.7e-3 / 2e12) and gate_up["met"] is True
    assert down["value"] is None and down["met"] is False
    assert step["value"] == pytest.approx(0.6) and step["met"] is True
    assert bytes_["value"] == pytest.approx(0.05) and bytes_["limit"] == 0.05
    assert "not measured" in _bench_gpu_bars.described(down) and "MISSED" in _bench_gpu_bars.described(down)
    elsewhere = _bench_gpu_bars.bars(rows, "residual4x2", "nano")
    assert [bar["met"] for bar in elsewhere] == [None] * 6 and elsewhere[0]["value"] == pytest.approx(9)


def test_check_names_missed_bars(monkeypatch, capsys):
    bars = _bench_gpu_bars.bars([fake_row("decode", "somebody", [1.0])], "residual4x2", "7b")
    result = {"shapes": [{"shape": "7b", "wrong": {}, "bars": bars}]}
    monkeypatch.setattr(_bench_gpu, "measure", lambda *_, **__: result)
    _bench_gpu.command(["nano"], SETTINGS, "cpu", as_json=True)
    with pytest.raises(CheckError, match="gate_up product, share of copy bandwidth: not measured"):
        _bench_gpu.command(["nano"], SETTINGS, "cpu", as_json=True, check=True)


def test_tables_and_plot(measured, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _bench_gpu_bars.show(measured)
    said = capsys.readouterr().out
    assert "cpu, figures mean nothing" in said and "gate_up product" in said and "no bar" in said
    picture = tmp_path / "shares.png"
    _bench_gpu_bars.plot(measured, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "expected cuda, cuda:0 (and so on) or cpu"),
        (["--device", "cpu", "--shape", "0.5b"], "--shape 0.5b: with --gpu expected one of"),
        (["--device", "cpu", "--shape", "nano", "--experts", "float"], "--experts float"),
        (["--device", "cpu", "--shape", "nano", "--block", "128"], "--experts residual4x2 needs widths"),
        (["--device", "cpu", "no-such-bundle"], "no-such-bundle"),
        (["--device", "cpu", "some-bundle", "--plot", "x.png"], "--plot draws random decoders"),
    ],
)
def test_bad_input(cli, arguments, words):
    ran = cli("bench", "--gpu", *arguments)
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1


def test_options_of_gpu_alone(cli):
    assert "--plot goes with --gpu" in cli("bench", "--plot", "x.png").err
    assert "--device goes with --gpu" in cli("bench", "--device", "cpu").err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line(cli):
    ran = cli("bench", "--gpu")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in ran.err and "--device cpu --shape nano" in ran.err


def test_cards_of_different_kinds_are_to_be_named(monkeypatch):
    monkeypatch.setattr(_bench_gpu_card, "_need_cuda", lambda torch: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("RTX 4090", "RTX 3060")[i])
    with pytest.raises(InputError, match="cuda:0 RTX 4090, cuda:1 RTX 3060"):
        _bench_gpu_card.open_card("cuda")
    with pytest.raises(InputError, match="this machine has 2"):
        _bench_gpu_card.open_card("cuda:2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    card = _bench_gpu_card.open_card("cuda:0")
    settings = dataclasses.replace(SETTINGS, forms=("residual4x2",), context=40, prefill=33)
    result = _bench_gpu.measure([SMALL], ["nano"], settings, card)
    (shape,) = result["shapes"]
    assert shape["wrong"] == {} and shape["skipped"] == {} and result["copy_gigabytes_per_s"] > 10

"""The plugins as TensorRT takes them: NVIDIA's own Python layer registers them, has their outputs described
and asks for their kernels; grids, scalars, argument order and PTX are what a launch by hand uses.
"""

from __future__ import annotations

import pytest

from crab_edge.errors import BundleError, CrabError, DependencyError
from crab_edge.ilora import plugin_kernels, ptx, tensorrt_plugins
from crab_edge.ilora.plugin_kernels import Kernels, KernelSet, Launch
from tests.ilora.tensorrt_layer import LAYER, Built, library, loaded

needs_layer = pytest.mark.skipif(LAYER is None, reason="tensorrt-cu13-bindings isn't installed")


def text(
    name: str, pointers: int, scalars: int, outputs: int = 1, hidden: int = 0, body: str = "ret;"
) -> str:
    """PTX of the form that Triton writes."""
    kinds = [".u64 .ptr .global .align 1"] * pointers + [".u32"] * scalars
    kinds += [".u64 .ptr .global .align 1"] * (outputs + hidden)
    lines = ",\n".join(f"\t.param {kind} {name}_param_{i}" for i, kind in enumerate(kinds))
    return (
        f"//\n// Generated\n//\n.version 8.5\n.target sm_87\n.address_size 64\n\n\t// .globl\t{name}\n"
        f".visible .entry {name}(\n{lines}\n)\n.reqntid 128\n{{\n\t{body}\n}}\n"
    )


def kernels(name: str = "one", plugin: str = "ILoRALinear", count: int = 4, columns: int = 96) -> Kernels:
    types = ("bfloat16", "bfloat16", "int8", "float16", "bfloat16", "bfloat16", "bfloat16")[:count]
    launches = {
        "decode": Launch(entry="few", grid=((None, 3), (8, 1), (None, 1)), threads=128, shared=512),
        "prefill": Launch(
            entry="many", grid=((64, 3), (None, 2), (None, 1)), threads=128, shared=0, arguments=("rows", 7)
        ),
    }
    texts = {(name, "decode"): text("few", count, 1), (name, "prefill"): text("many", count, 2)}
    digests = {tactic: plugin_kernels.digest(one) for (_, tactic), one in texts.items()}
    one = KernelSet(name=name, plugin=plugin, types=types, columns=columns, launches=launches, sha256=digests)
    return Kernels([one], texts)


@needs_layer
def test_an_engine_gets_what_a_launch_by_hand_uses():
    made = kernels()
    trt = library()
    with loaded(trt):
        tensorrt_plugins.register(made, trt)
        kinds = ["BF16", "BF16", "INT8", "HALF"]
        built = Built(trt, "ILoRALinear", "one", kinds, [(1, None, 64), (1, None, 48), (96, 2, 16), (2, 96)])
        assert built.output_types == [trt.DataType.BF16]
        assert [d.value(5) for d in built.output_dims] == [1, 5, 96]
        types = [[one.type.name for one in combination] for combination in built.combinations]
        assert types == [[*kinds, "BF16"]]
        assert sorted(built.tactics) == [1, 2]
        for tactic, name in ((1, "decode"), (2, "prefill"), (0, "decode")):
            launch = made.sets["one"].launches[name]
            entry, code, grid, threads, shared, scalars = built.kernel(tactic)
            assert code.decode() == made.ptx["one", name] and entry == ptx.entry(code.decode()).name
            assert (threads, shared) == (launch.threads, launch.shared)
            for rows in (1, 2, 7, 8, 9, 63, 64, 65, 511, 4096):
                assert grid(rows) == launch.blocks(rows)
                assert scalars(rows) == launch.scalars(rows)


@needs_layer
def test_rows_are_all_leading_axes():
    trt = library()
    with loaded(trt):
        tensorrt_plugins.register(kernels(plugin="LowBitLinear", count=3), trt)
        for shape in ((None, 64), (3, None, 64), (2, None, 5, 64)):
            fixed = 1
            for axis in shape[:-1]:
                fixed *= axis or 1
            built = Built(trt, "LowBitLinear", "one", ["BF16", "BF16", "INT8"], [shape, (96, 2, 16), (2, 96)])
            launch = kernels().sets["one"].launches["decode"]
            assert all(built.kernel(1)[2](v) == launch.blocks(v * fixed) for v in (1, 4, 9, 40))


@needs_layer
def test_every_operator_registers_once_and_kernels_are_replaced():
    trt = library()
    with loaded(trt) as layer:
        tensorrt_plugins.register(kernels("first"), trt)
        tensorrt_plugins.register(kernels("second", columns=7), trt)
        names = {name for name, _, _ in trt.get_plugin_registry().creators}
        assert names == set(tensorrt_plugins.OPERATORS)
        assert all(hasattr(layer.op.crab, name) for name in names)
        shapes = [(1, None, 64), (1, None, 48), (7, 2, 16), (2, 7)]
        kinds = ["BF16", "BF16", "INT8", "HALF"]
        built = Built(trt, "ILoRALinear", "second", kinds, shapes)
        assert built.output_dims[2].value(1) == 7
        with pytest.raises(BundleError, match=r"asks for the kernel 'first'.*export it again"):
            Built(trt, "ILoRALinear", "first", kinds, shapes)


def test_other_libraries_and_releases_are_refused():
    rtx = library()
    rtx.__name__ = "tensorrt_rtx"
    with pytest.raises(DependencyError, match="TensorRT-RTX has no plugins"):
        tensorrt_plugins.register(kernels(), rtx)
    for trt in (library("10.3.0", aot=False), library("10.8.0.1"), library("10.16.1", aot=False)):
        with pytest.raises(DependencyError, match=r"from 10\.9 on.*JetPack 7\.2"):
            tensorrt_plugins.register(kernels(), trt)


def test_a_kernel_for_an_unknown_operator_is_refused():
    for made in (kernels(plugin="ILoRASomething"), kernels(count=3)):
        with pytest.raises(BundleError, match=r"which this crab-edge doesn't know"):
            tensorrt_plugins.register(made, library())


def test_files_come_back_as_they_were_written(tmp_path):
    made = kernels()
    paths = made.write(tmp_path / "kernels")
    assert sorted(path.name for path in paths) == ["kernels.json", "one.decode.ptx", "one.prefill.ptx"]
    read = plugin_kernels.read(tmp_path / "kernels")
    assert read.sets == made.sets and read.ptx == made.ptx
    assert set(read.digests) == {"one.decode", "one.prefill"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "kernels.json").unlink(), "missing"),
        (lambda f: (f / "kernels.json").write_text("{"), "can't be read"),
        (lambda f: (f / "kernels.json").write_text('[{"name": "a b"}]'), "damaged"),
        (lambda f: (f / "one.decode.ptx").unlink(), "missing or unreadable"),
        (lambda f: (f / "one.decode.ptx").write_text(text("few", 4, 1) + "\n"), "SHA-256 differs"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    kernels().write(tmp_path)
    change(tmp_path)
    with pytest.raises(BundleError, match=f"{message}.*export the target again"):
        plugin_kernels.read(tmp_path)


def test_ptx_that_doesn_t_fit_its_launch_is_named():
    launch = Launch(entry="k", grid=((None, 1), (None, 1), (None, 1)), threads=128, shared=0)
    assert plugin_kernels.mismatch(text("k", 3, 1), launch, 3) is None
    assert "expected k" in plugin_kernels.mismatch(text("other", 3, 1), launch, 3)
    assert "takes 2 scalars" in plugin_kernels.mismatch(text("k", 3, 2), launch, 3)
    assert "pointers" in plugin_kernels.mismatch(text("k", 3, 1, hidden=2), launch, 3)
    assert "pointers" in plugin_kernels.mismatch(text("k", 4, 1), launch, 3)
    clustered = text("k", 3, 1, body="mov.u32 %r1, %cluster_ctaid.x;")
    assert "launch of clusters" in plugin_kernels.mismatch(clustered, launch, 3)
    other = launch.model_copy(update={"threads": 64})
    assert "128 threads" in plugin_kernels.mismatch(text("k", 3, 1), other, 3)


def test_parameters_that_nobody_passes_are_left_out():
    full = text("k", 2, 1, hidden=2)
    short = ptx.without_trailing(full, 2)
    assert short == text("k", 2, 1)
    assert ptx.entry(short).kinds == ("pointer", "pointer", "u32", "pointer")
    assert ptx.without_trailing(full, 0) == full
    with pytest.raises(CrabError, match="reads its parameter k_param_4"):
        ptx.without_trailing(text("k", 2, 1, hidden=2, body="ld.param.u64 %rd1, [k_param_4];"), 2)
    with pytest.raises(CrabError, match="can't leave out 9"):
        ptx.without_trailing(full, 9)
    with pytest.raises(CrabError, match="found 2 kernels"):
        ptx.entry(text("k", 1, 1) + text("l", 1, 1))


def test_too_much_shared_memory_is_refused():
    with pytest.raises(ValueError, match="less than or equal to 49152"):
        Launch(entry="k", grid=((None, 1), (None, 1), (None, 1)), threads=128, shared=65536)

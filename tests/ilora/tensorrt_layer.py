"""The Python layer of TensorRT's plugins as NVIDIA ships it, over a stand-in for the library beneath.

`tensorrt-cu13-bindings` holds that layer in pure Python; the library itself comes from nowhere but NVIDIA.
The stand-in has what the layer asks of it, and expressions of shapes that can be worked out for any shape: so
a plugin goes through the very calls that TensorRT makes while it builds an engine.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

LAYER = importlib.util.find_spec("tensorrt_bindings")


class Expr:
    """TensorRT's IDimensionExpr, with a value that may depend on a variable."""

    def __init__(self, value, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value(0)


def variable() -> Expr:
    """The free dimension."""
    return Expr(lambda v: v, False)


class Builder:
    """TensorRT's IExprBuilder."""

    def constant(self, value: int) -> Expr:
        return Expr(lambda _: value, True)

    def operation(self, op, a: Expr, b: Expr) -> Expr:
        work = {
            "SUM": lambda x, y: x + y,
            "SUB": lambda x, y: x - y,
            "PROD": lambda x, y: x * y,
            "FLOOR_DIV": lambda x, y: x // y,
            "CEIL_DIV": lambda x, y: -(-x // y),
        }[op.name]
        return Expr(lambda v: work(a.value(v), b.value(v)), a.constant and b.constant)


class Base:
    """Any of the classes that the layer derives from."""

    def __init__(self, *args) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self.creators = {}

    def register_creator(self, creator, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str):
        return self.creators[name, version, namespace]


class Dims(tuple):
    MAX_DIMS = 8


class DimsExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class TensorDesc:
    """TensorRT's PluginTensorDesc."""

    def __init__(self, dims=(), type=None, format=None) -> None:
        self.dims, self.type, self.format, self.scale = dims, type, format, 0.0


class DynamicDesc:
    """TensorRT's DynamicPluginTensorDesc."""

    def __init__(self, desc: TensorDesc) -> None:
        self.desc = desc


class Setter(dict):
    """What TensorRT collects a kernel's scalar arguments in."""

    nbSymExprs = 0


def _enum(name: str, *members: str):
    return enum.Enum(name, members)


def library(version: str = "10.16.1.11", aot: bool = True) -> ModuleType:
    """A stand-in for the module `tensorrt` of that release."""
    trt = ModuleType("tensorrt")
    registry = Registry()
    trt.__version__ = version
    trt.DataType = _enum("DataType", "FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "INT4", "FP8")
    trt.float32, trt.float16, trt.int32 = trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.INT32
    trt.TensorFormat = _enum("TensorFormat", "LINEAR")
    trt.DimensionOperation = _enum(
        "DimensionOperation", "SUM", "PROD", "MAX", "MIN", "SUB", "EQUAL", "LESS", "FLOOR_DIV", "CEIL_DIV"
    )
    trt.PluginFieldType = _enum(
        "PluginFieldType",
        *("FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "INT64", "CHAR", "UNKNOWN"),
    )
    trt.PluginArgType = _enum("PluginArgType", "INT")
    trt.PluginArgDataType = _enum("PluginArgDataType", "INT8", "INT16", "INT32")
    trt.TensorRTPhase = _enum("TensorRTPhase", "BUILD", "RUNTIME")
    trt.Logger = type("Logger", (Base,), {"WARNING": 2, "log": lambda self, severity, text: None})
    trt.IDimensionExpr, trt.IExprBuilder = Expr, Builder
    trt.Dims, trt.DimsExprs = Dims, DimsExprs
    trt.PluginTensorDesc, trt.DynamicPluginTensorDesc = TensorDesc, DynamicDesc
    trt.PluginField = lambda name, data, type: SimpleNamespace(name=name, data=data, type=type)
    trt.PluginFieldCollection = list
    trt.get_plugin_registry = lambda: registry
    trt.nptype = None
    for name in ("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime"):
        setattr(trt, name, type(name, (Base,), {}))
    for name in ("IPluginCreatorV3Quick", "ITensor", "ISymExpr", "IPluginV3QuickAOTBuild"):
        setattr(trt, name, type(name, (Base,), {}))
    if aot:
        requests = ("UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT")
        trt.QuickPluginCreationRequest = _enum("QuickPluginCreationRequest", *requests)
    return trt


@contextmanager
def loaded(trt: ModuleType) -> Iterator[ModuleType]:
    """NVIDIA's layer over `trt`, as `tensorrt.plugin`, for the time of the block."""
    folder = Path(LAYER.origin).parent / "plugin"
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    sys.modules["tensorrt"] = trt
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


class Built:
    """A plugin as an engine would hold it: made from a node's attributes, asked for a tactic's kernel."""

    def __init__(self, trt: ModuleType, name: str, kernel: str, types, shapes) -> None:
        """types, shapes: of the inputs; None in a shape is the free dimension."""
        self.trt, self.types = trt, [getattr(trt.DataType, one) for one in types]
        creator = trt.get_plugin_registry().get_creator(name, "1", "crab")
        text = SimpleNamespace(tobytes=lambda: kernel.encode() + b"\0")
        field = SimpleNamespace(name="kernel", data=text)
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        self.plugin = creator.create_plugin(name, "crab", [field], trt.TensorRTPhase.BUILD, request)
        self.builder = Builder()
        self.shapes = shapes
        self.dims = [[variable() if d is None else self.builder.constant(d) for d in s] for s in shapes]
        self.output_types = self.plugin.get_output_data_types(self.types, [len(s) for s in shapes])
        self.output_dims = self.plugin.get_output_shapes(self.dims, [], self.builder)[0]
        combinations = self.plugin.get_supported_format_combinations(self._descs(), len(types))
        step = len(types) + 1
        self.combinations = [combinations[i : i + step] for i in range(0, len(combinations), step)]
        self.plugin.configure_plugin(self._descs()[:-1], self._descs()[-1:])
        self.tactics = self.plugin.get_valid_tactics()

    def _descs(self) -> list[DynamicDesc]:
        linear = self.trt.TensorFormat.LINEAR
        shapes = [*self.shapes, [None] * len(self.output_dims)]
        kinds = [*self.types, *self.output_types]
        return [
            DynamicDesc(TensorDesc([-1 if d is None else d for d in shape], kind, linear))
            for shape, kind in zip(shapes, kinds, strict=True)
        ]

    def kernel(self, tactic: int):
        """(entry, PTX, grid(rows), threads, shared bytes, scalars(rows)) of a tactic."""
        self.plugin.set_tactic(tactic)
        launch, scalars = SimpleNamespace(), Setter()
        self.plugin.get_launch_params(
            self.dims, self._descs(), len(self.types), launch, scalars, self.builder
        )
        descs = [one.desc for one in self._descs()]
        entry, ptx = self.plugin.get_kernel(descs[:-1], descs[-1:])
        grid = [launch.grid_x, launch.grid_y, launch.grid_z]
        assert launch.block_y.expr.value(0) == launch.block_z.expr.value(0) == 1
        assert all(one.dtype is self.trt.PluginArgDataType.INT32 for one in scalars.values())
        return (
            entry,
            ptx,
            lambda rows: tuple(one.expr.value(rows) for one in grid),
            launch.block_x.expr.value(0),
            launch.shared_mem.expr.value(0),
            lambda rows: tuple(scalars[i].expr.value(rows) for i in range(scalars.nbSymExprs)),
        )

"""I-LoRA's operators as TensorRT plugins defined in Python, with kernels compiled ahead of time.

TensorRT (10.9 or newer; not TensorRT-RTX) puts each plugin's PTX into the engine with how to launch it, so
the machine that runs the engine needs neither this module nor a plugin library. Here TensorRT is told, for
every operator of the domain `crab`: its output's shape and type, which types it takes, and for each tactic
the PTX, the grid as an expression of the inputs' shapes, and the scalar arguments.

    ILoRARoute(x, AR, AR_scale) -> z
    ILoRAExperts(y0, z, B, B_scale) -> y
    ILoRALinear(x, z, W, W_scale) -> y
    ILoRALinearExperts(x, z, W, W_scale, B, B_scale) -> y
    LowBitLinear(x, W, W_scale) -> y

The last three exist with a `bias` as last input too, their names ending in `Bias`: TensorRT's plugins have a
fixed number of inputs. Weights lie as `crab_edge.ilora.torch_ops.gpu_layout` makes them, codes as int8
(TensorRT has no uint8 inside a network). All leading axes of activations are rows.

Each operator has one attribute, `kernel`: the name of its `KernelSet`. A string, because TensorRT up to 11.3
reads int attributes in a way that NumPy 2.4 refuses, and because attributes aren't kept in the engine anyway:
sizes are compiled into the kernel.

TensorRT tries the tactics at each profile's shapes and keeps the faster: "decode" for a few rows, "prefill"
for many. Both are right for any number of rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from crab_edge.errors import BundleError, DependencyError

from .plugin_kernels import TACTICS, Kernels, KernelSet, Launch

NAMESPACE = "crab"
ATTRIBUTE = "kernel"
OLDEST = (10, 9)
_TYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "int8": "INT8"}
# The value that TensorRT's plugins have where they offer no tactics.
_DEFAULT_TACTIC = 0


OPERATORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ILoRARoute": ("x", "AR", "AR_scale"),
        "ILoRAExperts": ("y0", "z", "B", "B_scale"),
        "ILoRALinear": ("x", "z", "W", "W_scale"),
        "ILoRALinearBias": ("x", "z", "W", "W_scale", "bias"),
        "ILoRALinearExperts": ("x", "z", "W", "W_scale", "B", "B_scale"),
        "ILoRALinearExpertsBias": ("x", "z", "W", "W_scale", "B", "B_scale", "bias"),
        "LowBitLinear": ("x", "W", "W_scale"),
        "LowBitLinearBias": ("x", "W", "W_scale", "bias"),
    }
)
"""The plugins with their inputs in order."""

# Kernel sets that registered plugins look names up in, by the plugin module they are registered with:
# TensorRT keeps plugins as long as the process lives, their kernels change with each engine that is built.
_active: WeakKeyDictionary[ModuleType, Kernels] = WeakKeyDictionary()


def check_version(trt: ModuleType) -> None:
    """Raises DependencyError when this TensorRT can't put kernels compiled ahead of time into an engine."""
    version = str(getattr(trt, "__version__", "0"))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if trt.__name__ == "tensorrt_rtx":
        raise DependencyError(
            "TensorRT-RTX has no plugins defined in Python; build a target of TensorRT on a machine that has "
            "it, or use --target rtx, whose engines need none"
        )
    if numbers < OLDEST or not hasattr(trt, "QuickPluginCreationRequest"):
        raise DependencyError(
            f"TensorRT {version} can't hold plugins with compiled kernels, which exist from 10.9 on; on a "
            "Jetson install JetPack 7.2 (TensorRT 10.16), or run the bundle with --engine onnxruntime"
        )


def register(kernels: Kernels, trt: ModuleType) -> None:
    """Registers all operators with TensorRT, and makes `kernels` the ones that engines are built with.

    Called again, only the kernels change. Raises DependencyError where TensorRT is too old, BundleError when
    a kernel set is for an operator that doesn't exist.
    """
    check_version(trt)
    for one in kernels.sets.values():
        if len(OPERATORS.get(one.plugin, ())) != len(one.types):
            raise BundleError(
                f"kernel {one.name} is for {one.plugin} with {len(one.types)} inputs, which this crab-edge "
                "doesn't know; export the target again with this version"
            )
    plugin = import_module(f"{trt.__name__}.plugin")
    known = plugin in _active
    _active[plugin] = kernels
    if not known:
        for name, inputs in OPERATORS.items():
            _define(name, inputs, plugin)


def _define(name: str, inputs: tuple[str, ...], plugin: Any) -> None:
    """Hands the three functions of one operator to TensorRT, with the signatures that it checks."""
    identity = f"{NAMESPACE}::{name}"
    tensors = [_positional(one, plugin.TensorDesc) for one in inputs]
    attribute = _positional(ATTRIBUTE, str)
    outputs = _positional("outputs", tuple[plugin.TensorDesc])
    tactic = _positional("tactic", int)
    offers = list[plugin.AutoTuneCombination]
    result = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    count = len(inputs)
    # TensorRT checks its functions' signatures by their annotations; one body serves all operators.
    plugin.register(identity)(_signed(_describe(plugin), [*tensors, attribute], plugin.TensorDesc))
    plugin.autotune(identity)(_signed(_offer(count, plugin), [*tensors, attribute, outputs], offers))
    plugin.aot_impl(identity)(
        _signed(_compiled(count, plugin), [*tensors, attribute, outputs, tactic], result)
    )


def _positional(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _signed(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter], result: Any
) -> Callable[..., Any]:
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _set(plugin: ModuleType, name: str) -> KernelSet:
    # The ONNX parser may hand a string over as C has it.
    name = name.rstrip("\0")
    found = _active[plugin].sets.get(name)
    if found is None:
        raise BundleError(f"the graph asks for the kernel {name!r}, which isn't beside it; export it again")
    return found


def _describe(plugin: Any) -> Callable[..., Any]:
    def describe(*inputs: Any, kernel: str) -> Any:
        """Of the output: the first input's type and leading axes, and the kernel's columns."""
        out = inputs[0].like()
        out.shape_expr[len(out.shape_expr) - 1] = _set(plugin, kernel).columns
        return out

    return describe


def _offer(inputs: int, plugin: Any) -> Callable[..., Any]:
    def offer(*arguments: Any) -> Any:
        """Which types the kernels take, and which tactics there are."""
        found = _set(plugin, arguments[inputs])
        types = [_TYPES[one] for one in (*found.types, found.types[0])]
        tactics = [TACTICS[name] for name in found.launches]
        return [plugin.AutoTuneCombination(", ".join(types), "LINEAR", tactics)]

    return offer


def _compiled(inputs: int, plugin: Any) -> Callable[..., Any]:
    def compiled(*arguments: Any) -> Any:
        """The kernel of a tactic and how it is launched."""
        kernel, _, tactic = arguments[inputs:]
        found = _set(plugin, kernel)
        names = {TACTICS[name]: name for name in found.launches}
        name = names.get(tactic) if tactic != _DEFAULT_TACTIC else next(iter(found.launches))
        if name is None:
            raise BundleError(f"kernel {kernel} has no tactic {tactic}, only {sorted(names)}")
        launch = found.launches[name]
        rows = row_count(arguments[0].shape_expr)
        scalars = plugin.SymIntExprs(len(launch.arguments))
        for index, value in enumerate(launch.arguments):
            scalars[index] = plugin.SymInt32(value if isinstance(value, int) else rows)
        ptx = _active[plugin].ptx[found.name, name]
        return launch.entry, ptx, launch_parameters(launch, rows, plugin), scalars

    return compiled


def row_count(shape: Any) -> Any:
    """The product of all axes but the last, as an expression."""
    rows = shape[0]
    # Expressions know `expression * int`, not the reverse.
    for index in range(1, len(shape) - 1):
        rows = rows * shape[index]
    return rows


def launch_parameters(launch: Launch, rows: Any, plugin: Any) -> Any:
    """A launch as TensorRT's expressions of `rows`."""
    parameters = plugin.KernelLaunchParams()
    x, y, z = (_blocks(tile, count, rows, plugin) for tile, count in launch.grid)
    parameters.grid_x, parameters.grid_y, parameters.grid_z = x, y, z
    parameters.block_x = launch.threads
    parameters.shared_mem = launch.shared
    return parameters


def _blocks(tile: int | None, count: int, rows: Any, plugin: Any) -> Any:
    if tile is None:
        return count
    blocks = rows if tile == 1 else plugin.cdiv(rows, tile)
    return blocks if count == 1 else blocks * count

"""The process that examines one engine: `python -m crab_edge.doctor.probe ENGINE BUNDLE CLIP`.

Each step is announced on standard output before it is taken, so that whoever reads knows which one ended it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crab_edge.doctor import QUESTION
from crab_edge.errors import CrabError, DependencyError, DeviceError, EngineError, InputError

Say = Callable[..., None]
_TOKENS = 8


def main(arguments: list[str]) -> int:
    """Examines the engine and reports; 0 unless the process is ended by it."""
    # Libraries print to standard output too.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**report: Any) -> None:
        print(json.dumps(report), file=out, flush=True)

    engine, bundle, clip = arguments[0], Path(arguments[1]), Path(arguments[2])
    family, _, variant = engine.partition(":")
    state = "missing"
    try:
        kernel = {"onnxruntime": _onnxruntime, "tensorrt": _tensorrt, "torch": _torch}[family]
        kernel(variant, say)
        state = "kernel only"
        say(state=state, step=f"asking {bundle.name}")
        _ask(engine, bundle, clip, say)
    except DependencyError as error:
        say(state=state, problem=str(error))
    except CrabError as error:
        say(state="fails" if state == "missing" else state, problem=str(error))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        say(state="fails" if state == "missing" else state, problem=f"{type(error).__name__}: {text}")
    say(end=True)
    return 0


def _ask(engine: str, bundle: Path, clip: Path, say: Say) -> None:
    """One short question about the clip, from loading to the answer."""
    import crab_edge
    from crab_edge.bundle import Bundle

    name = engine
    started = time.perf_counter()
    opened = Bundle.open(bundle)
    if engine.startswith("tensorrt:"):
        name = f"tensorrt:{_target(opened, engine.partition(':')[2])}"
    model = crab_edge.load(opened, name)
    model.grammars()
    answer = model.open(clip).ask(QUESTION, max_new_tokens=_TOKENS, grammar=False)
    assert not isinstance(answer, list)
    described = model.engine.describe()
    shown = {
        key: str(described[key]) for key in ("provider", "dtype", "device", "target") if key in described
    }
    say(
        state="works",
        seconds=round(time.perf_counter() - started, 3),
        answer=answer.raw,
        facts=shown | {"engine": name},
    )


def _target(bundle: Any, library: str) -> str:
    """The bundle's target for this library on this machine."""
    from crab_edge.engines import _tensorrt_check as checks
    from crab_edge.engines import tensorrt

    mine = {name: info for name, info in bundle.manifest.engines.items() if info.library == library}
    here = tensorrt.machine()
    if not mine:
        target = "rtx" if library == "tensorrt_rtx" else checks.suggestion(here)
        raise InputError(
            f"{bundle.manifest.model.name} has no engine for {library}; make one with `crab-edge export "
            f"--bundle {bundle.path} --target {target} --out DIR`, then `crab-edge doctor DIR`"
        )
    only = type(bundle)(bundle.path, bundle.manifest.model_copy(update={"engines": mine}))
    return checks.choose(only, None, here)[0]


def _onnxruntime(variant: str, say: Say) -> None:
    """A product in a session on the provider, its nodes looked at."""
    import numpy as np

    from crab_edge.engines import _onnxruntime_provider as providers

    say(step="importing onnxruntime")
    provider = providers.find(variant)
    packages = providers.installed()
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        way = "pip install 'crab-edge[gpu]'" if variant == "cuda" else "pip install 'crab-edge[cpu]'"
        raise DependencyError(f"onnxruntime can't be imported ({error}); run `{way}`") from error
    say(facts={"version": onnxruntime.__version__, "package": ", ".join(packages) or "not pip's"})
    if len(packages) > 1:
        names = " and ".join(packages)
        keep = providers.ONE_PACKAGE.format(extra="gpu" if variant == "cuda" else "cpu")
        say(notes=[f"{names} are both installed and overwrite each other; keep one: `{keep}`"])
    providers.check(provider, onnxruntime)
    say(step=f"running a product on {provider.package}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    wanted = providers.options_for(provider, onnxruntime, options)
    session = onnxruntime.InferenceSession(product_model(), options, providers=wanted or None)
    providers.assert_runs(provider, session, Path("a product"))
    x = np.eye(_SIZE, dtype=np.float32) * 3
    started = time.perf_counter()
    (y,) = session.run(None, {"x": x})
    _same(y, x @ x, provider.package)
    say(facts={"kernel": f"a product in {1e3 * (time.perf_counter() - started):.1f} ms"})


_SIZE = 64


def product_model() -> bytes:
    """An ONNX model of one node: y = x x, float32 [64, 64]."""
    from crab_edge.protobuf import field

    dims = field(1, field(1, _SIZE)) * 2
    tensor = field(2, field(1, field(1, 1) + field(2, dims)))
    node = field(1, "x") * 2 + field(2, "y") + field(4, "MatMul")
    graph = field(1, node) + field(2, "product")
    graph += field(11, field(1, "x") + tensor) + field(12, field(1, "y") + tensor)
    return field(1, 10) + field(7, graph) + field(8, field(1, "") + field(2, 21))


def _torch(variant: str, say: Say) -> None:
    """A product in torch, and one in the low-bit kernels; see `crab_edge.engines._torch_doctor`."""
    say(step="importing torch")
    if importlib.util.find_spec("torch") is None:
        extra = "cuda" if variant == "cuda" else "train"
        raise DependencyError(f"torch isn't installed; run `pip install 'crab-edge[{extra}]'`")
    importlib.import_module("crab_edge.engines._torch_doctor").kernels(variant, say)


def _tensorrt(library: str, say: Say) -> None:
    """An engine of one node: built, opened and run on the GPU."""
    import numpy as np

    from crab_edge.doctor.machine import jetpack, jetson_linux
    from crab_edge.engines import _cuda
    from crab_edge.engines import _tensorrt_check as checks
    from crab_edge.engines._tensorrt_graph import make_log

    say(step=f"importing {library}")
    found, broken = checks.installed()
    if library not in found:
        why = f"can't be imported ({broken[library]})" if library in broken else "isn't installed"
        raise DependencyError(f"{library} {why}; {checks.INSTALL[library]}")
    module = importlib.import_module(library)
    say(facts={"version": found[library]})
    if library == "tensorrt" and checks.numbers(found[library])[:2] < checks.IN_PLACE:
        linux = jetson_linux()
        here = f" (JetPack {jetpack(linux)})" if linux else ""
        say(
            notes=[
                f"TensorRT {found[library]}{here} can't build or run this program's engines, which update "
                "their cache in place (from 10.15 on) and carry their kernels (from 10.9 on). JetPack 7.2 "
                "has 10.16; here use --engine onnxruntime"
            ]
        )
    log = make_log(module)
    say(step=f"building an engine with {library}")
    plan = _build(module, log)
    say(facts={"kernel": "an engine of one node was built"}, step="looking for a GPU")
    driver = _cuda.driver()
    gpu = driver.gpus()[0]
    device = _cuda.Device()
    free, total = device.memory()
    say(
        facts={
            "device": f"{gpu.name}, compute capability {gpu.capability}",
            "device memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        },
        step=f"running the engine on {gpu.name}",
    )
    if library == "tensorrt_rtx" and gpu.sm == 87:
        raise DeviceError("tensorrt_rtx has no kernels for Jetson Orin; use JetPack's tensorrt")
    engine = module.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise checks.explain(
            f"{library} can't open the engine it has just built", log.take(), "crab-edge export"
        )
    context = engine.create_execution_context()
    if context is None:
        raise checks.explain(f"{library} can't run an engine", log.take(), "crab-edge export")
    x, y = device.pinned((_SIZE,), np.float32), device.pinned((_SIZE,), np.float32)
    x[:] = np.arange(_SIZE)
    there, back = device.allocate(x.nbytes), device.allocate(y.nbytes)
    context.set_tensor_address("x", there.address)
    context.set_tensor_address("y", back.address)
    started = time.perf_counter()
    device.upload(x, there.address)
    if not context.execute_async_v3(device.stream):
        raise checks.explain(f"{library} can't run an engine", log.take(), "crab-edge export")
    device.download(back.address, y)
    device.synchronize()
    _same(y, x + x, library)
    say(facts={"kernel": f"an engine of one node in {1e3 * (time.perf_counter() - started):.1f} ms"})


def _build(module: Any, log: Any) -> bytes:
    """A serialised engine: y = x + x, float32 [64]."""
    from crab_edge.engines import _tensorrt_check as checks

    try:
        builder = module.Builder(log)
        flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        x = network.add_input("x", module.float32, (_SIZE,))
        total = network.add_elementwise(x, x, module.ElementWiseOperation.SUM).get_output(0)
        total.name = "y"
        network.mark_output(total)
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    except (TypeError, AttributeError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}; {log.take()}"
        raise checks.explain(f"{module.__name__} can't build an engine", text, "crab-edge export") from error
    if plan is None:
        raise checks.explain(f"{module.__name__} can't build an engine", log.take(), "crab-edge export")
    return bytes(plan)


def _same(actual: Any, expected: Any, where: str) -> None:
    import numpy as np

    if not np.allclose(actual, expected, rtol=1e-3, atol=1e-3):
        raise EngineError(
            f"{where} computes wrong numbers; reinstall it, and the NVIDIA driver if it runs on a GPU"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

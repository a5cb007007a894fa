"""Builds one engine in a process of its own, because TensorRT's parser and builder may abort: run as a module.

The job is a JSON file: library, onnx, engine (paths), sm (compute capabilities; none builds for the GPU that is
here), workspace (bytes), profiles (name -> {input: [smallest, tuned for, largest shape]}, in order). What was built
goes to `engine`, and what is in it, as JSON, to `result`. Errors go to stderr, and the exit code is 1.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(path: str) -> int:
    """Builds the job in the file `path`; the exit code."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    trt = importlib.import_module(job["library"])
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        for index in range(parser.num_errors):
            print(f"parser: {parser.get_error(index)}", file=sys.stderr)
        return 1
    plan = builder.build_serialized_network(network, _config(trt, builder, network, job))
    if plan is None:
        print("the builder gave no engine", file=sys.stderr)
        return 1
    with Path(job["engine"]).open("wb") as file:
        file.write(plan)
    found = {
        "version": trt.__version__,
        "size": plan.nbytes,
        "layers": _layers(network),
        "weights": _weights(trt, network),
    }
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    # What is float32 in the graph is there for its precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
    if job["sm"]:
        config.num_compute_capabilities = len(job["sm"])
        for index, sm in enumerate(job["sm"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    for shapes in job["profiles"].values():
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    return config


def _layers(network: Any) -> dict[str, int]:
    """How many layers there are of each kind."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return dict(Counter(layer.type.name for layer in layers))


_BITS = {"INT4": 4, "FP4": 4, "INT8": 8, "FP8": 8, "UINT8": 8, "BOOL": 8, "HALF": 16, "BF16": 16, "INT64": 64}


def _weights(trt: Any, network: Any) -> dict[str, int]:
    """Bytes of constants by type, as they go into the engine."""
    total: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            out = layer.get_output(0)
            kind = out.dtype.name
            total[kind] += math.prod(out.shape) * _BITS.get(kind, 32) // 8
    return dict(total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

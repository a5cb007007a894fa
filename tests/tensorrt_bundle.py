"""The packaged bundle with engine files of `tests.fake_tensorrt` under `engines/<target>/`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests import fake_tensorrt

VERSION = "10.16.2"
CAPACITY = 1024
DECODER_PROFILES = [
    {"name": "decode", "axes": {"S": (1, 1, 8)}},
    {"name": "prefill", "axes": {"S": (1, 128, 256)}},
]
VISION_PROFILES = [{"name": "frames", "axes": {"patches": (256, 512, 512)}}]
AUDIO_PROFILES = [{"name": "chunks", "axes": {"chunks": (1, 3, 3)}}]
BUILD = "crab-edge export --bundle BUNDLE --target test --out OUT"


def add_engines(
    folder: Path, target: str = "test", *, library: str = "tensorrt", sm=(89,), misbehave=None, **changes
):
    """Copies the packaged bundle to `folder` with the engine of a target; the opened bundle.

    misbehave: for `fake_tensorrt.write_engine`, by graph; `changes`: fields of the manifest's EngineInfo.
    """
    from crab_edge.bundle import Bundle, default_bundle, file_sha256
    from crab_edge.manifest import MANIFEST_NAME, Manifest

    if not folder.exists():
        shutil.copytree(default_bundle(), folder)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    info = {
        "kind": "rtx" if library == "tensorrt_rtx" else "tensorrt",
        "library": library,
        "version": VERSION,
        "sm": list(sm),
        "capacity": CAPACITY,
        "built": True,
        "build_command": BUILD,
        "graphs": {},
        **changes,
    }
    written = {"version": info["version"], "sm": info["sm"]}
    for name, profiles in (
        ("decoder", DECODER_PROFILES),
        ("vision", VISION_PROFILES),
        ("audio", AUDIO_PROFILES),
    ):
        file = f"engines/{target}/{name}.engine"
        graph = _graph(content, name, folder, file, profiles)
        how = {"padded": True} if name == "audio" else {}
        how |= {"sizes": {"Smax": info["capacity"]}} if name == "decoder" else {}
        how |= (misbehave or {}).get(name, {})
        how = {"profiles": [one["axes"] for one in profiles]} | written | how
        fake_tensorrt.write_engine(folder / file, folder / f"{name}.onnx", **how)
        info["graphs"][name] = graph
        content["files"][file] = {
            "size": (folder / file).stat().st_size,
            "sha256": file_sha256(folder / file),
        }
    content.setdefault("engines", {})[target] = info
    (folder / MANIFEST_NAME).write_text(Manifest.model_validate(content).to_text())
    return Bundle.open(folder)


def _graph(content, name, folder, file, profiles):
    import onnxruntime

    kinds = {
        "tensor(float)": "float32",
        "tensor(float16)": "float16",
        "tensor(int32)": "int32",
        "tensor(int64)": "int64",
    }
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    inputs = [
        {"name": one.name, "dtype": kinds[one.type], "shape": one.shape} for one in session.get_inputs()
    ]
    outputs = [
        {"name": one.name, "dtype": kinds[one.type], "shape": one.shape} for one in session.get_outputs()
    ]
    if name == "audio":
        outputs[0]["shape"] = ["chunks", 50, outputs[0]["shape"][-1]]
        outputs.append({"name": "tokens", "dtype": "int64", "shape": ["chunks"]})
    aliases = {
        f"present.{i}.{part}": f"past.{i}.{part}"
        for i in range(content["model"]["layers"])
        for part in ("key", "value")
    }
    return {
        "file": file,
        "inputs": inputs,
        "outputs": outputs,
        "profiles": profiles,
        "aliases": aliases if name == "decoder" else {},
    }

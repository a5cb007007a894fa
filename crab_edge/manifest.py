"""`bundle.json`: what a bundle holds, which model it is, how it was made and what was measured on it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from crab_edge import __version__
from crab_edge.errors import BundleError

SCHEMA_VERSION = 1
SHA256 = r"^[0-9a-f]{64}$"
MANIFEST_NAME = "bundle.json"
ENGINES = "engines"
REBUILD = "`crab-edge export --model DIR --adapter DIR --out BUNDLE`"
COPY_AGAIN = f"copy the bundle again or rebuild it with {REBUILD}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterInfo(_Strict):
    """The I-LoRA adapter: `adapted_linears` linears carry it, in `zero_linears` of them B is all zeros."""

    rank: int = Field(gt=0)
    experts: int = Field(gt=0)
    alpha: float
    adapted_linears: int = Field(ge=0)
    zero_linears: int = Field(ge=0, default=0)


class ShapeInfo(_Strict):
    """Sizes that the runtime doesn't need but planning does: `crab_edge.shape` reads them.

    `vision` and `audio` by the names of their configurations; `tower_adapters`: whether the encoders' experts
    do anything.
    """

    intermediate_size: int = Field(gt=0)
    heads: int = Field(gt=0)
    tied: bool = False
    vision: dict[str, int]
    audio: dict[str, int]
    tower_adapters: bool = True


class ModelInfo(_Strict):
    """Identity and sizes of the decoder; `max_positions` bounds prompt plus answer, in tokens.

    `question_templates` are regular expressions: a free question that matches none in full is unfamiliar to
    the model. None means that the model takes any question. `tasks` are those it was trained on, None = all.
    """

    name: str
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    n_parameters: int = Field(ge=0)
    adapter: AdapterInfo | None = None
    question_templates: list[str] | None = None
    labels: list[str] | None = None
    tasks: list[str] | None = None
    eos_ids: list[int] = Field(min_length=1)
    shape: ShapeInfo | None = None

    @field_validator("question_templates")
    @classmethod
    def _compiles(cls, templates: list[str] | None) -> list[str] | None:
        for template in templates or ():
            try:
                re.compile(template)
            except re.error as error:
                raise ValueError(f"{template!r} is no regular expression: {error}") from error
        return templates


class Recipe(_Strict):
    """How the weights are stored: bits of each kind of weight, and the type of the KV cache."""

    name: str
    bits: int
    block: int
    accuracy_level: int = Field(ge=0, le=4)
    experts: Literal["residual4x2", "plane4", "unfolded8", "float"]
    adapter_bits: int
    head_bits: int
    embedding_bits: Literal[8, 32]
    tower_bits: int
    kv_dtype: Literal["float32", "float16"]
    block8: int | None = None
    """Weights that share a scale in the 8-bit parts; None: `block`."""


class Graphs(_Strict):
    """File names of the three graphs inside the bundle."""

    decoder: str = "decoder.onnx"
    audio: str = "audio.onnx"
    vision: str = "vision.onnx"


class FileInfo(_Strict):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)


class TensorInfo(_Strict):
    """An input or output of an engine; strings in `shape` name the axes that its profiles bound."""

    name: str
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: list[int | str]


class EngineProfile(_Strict):
    """Bounds of an engine's dynamic axes: (smallest, tuned for, largest). `name` says what it is for."""

    name: str
    axes: dict[str, tuple[int, int, int]]

    @field_validator("axes")
    @classmethod
    def _ordered(cls, axes: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for axis, (low, tuned, high) in axes.items():
            if not 0 < low <= tuned <= high:
                raise ValueError(
                    f"axis {axis} has bounds {low}, {tuned}, {high}; expected 0 < min <= opt <= max"
                )
        return axes


class EngineGraph(_Strict):
    """One engine file, or the ONNX file that it is to be built from.

    `profiles` are in the engine's own order. `aliases`: output -> the input whose memory it must be bound to.
    """

    file: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    aliases: dict[str, str] = {}
    profiles: list[EngineProfile] = Field(min_length=1)


class EngineInfo(_Strict):
    """What lies under `engines/<target>/`.

    library: the module that built it and runs it (`tensorrt_rtx`, `tensorrt`), `version` its exact version,
    or, where `built` is false, the oldest that can build it; sm: compute capabilities (89 is 8.9);
    activations: type of the products' inputs; capacity: tokens that the KV cache holds; plugins: name ->
    SHA-256 of the PTX inside the engine; build_command: makes the engine again, or for the first time.

    The decoder's inputs are the bundle contract's, less `total_sequence_length`: `seqlens_k` (int32 [1], the
    cache's length after this call, less 1) says where the new tokens' keys and values go.
    """

    kind: Literal["rtx", "tensorrt"]
    library: Literal["tensorrt_rtx", "tensorrt"]
    version: str = Field(pattern=r"^\d+(\.\d+)*$")
    sm: list[int] = Field(min_length=1)
    activations: Literal["float16", "bfloat16", "float32"] = "float16"
    capacity: int = Field(gt=0)
    plugins: dict[str, str] = {}
    graphs: dict[Literal["decoder", "vision", "audio"], EngineGraph]
    built: bool
    build_command: str

    @field_validator("plugins")
    @classmethod
    def _hashed(cls, plugins: dict[str, str]) -> dict[str, str]:
        for name, digest in plugins.items():
            if not re.fullmatch(SHA256, digest):
                raise ValueError(f"plugin {name}: expected a SHA-256 in hex, got {digest!r}")
        return plugins


class Manifest(_Strict):
    """The whole of `bundle.json`. `digest` is the SHA-256 of everything else in it: the bundle's identity."""

    schema_version: int = SCHEMA_VERSION
    crab_edge: str = __version__
    created: str = ""
    model: ModelInfo
    recipe: Recipe
    graphs: Graphs = Graphs()
    files: dict[str, FileInfo] = {}
    engines: dict[str, EngineInfo] = {}
    parity: dict[str, Any] = {}
    requires: dict[str, str] = {"onnxruntime": ">=1.23"}
    digest: str = ""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for name in files:
            check_name(name)
        return files

    @field_validator("engines")
    @classmethod
    def _placed(cls, engines: dict[str, EngineInfo]) -> dict[str, EngineInfo]:
        for target, engine in engines.items():
            for name, graph in engine.graphs.items():
                check_name(graph.file)
                if not graph.file.startswith(f"{ENGINES}/{target}/"):
                    raise ValueError(
                        f"{target}'s {name} is {graph.file!r}, expected it in {ENGINES}/{target}/"
                    )
        return engines

    @field_validator("requires")
    @classmethod
    def _minimum(cls, requires: dict[str, str]) -> dict[str, str]:
        for package, wanted in requires.items():
            if not re.fullmatch(r">=\d+(\.\d+)*", wanted):
                raise ValueError(f"{package}: expected a minimum such as '>=1.23', got {wanted!r}")
        return requires

    @property
    def total_size(self) -> int:
        """Bytes of all files but `bundle.json` itself."""
        return sum(info.size for info in self.files.values())

    def to_text(self) -> str:
        """The text of `bundle.json`, with the digest of its content filled in."""
        content = self.model_dump(mode="json")
        content["digest"] = content_digest(content)
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's content without its `digest`, in a canonical JSON form."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a plain relative POSIX path that stays inside its folder."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    if not path.parts or not plain or name == MANIFEST_NAME or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError(f"{name!r} is not the name of a file inside the bundle")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `folder/bundle.json`.

    Raises BundleError when it is missing, damaged, or of another schema than this version reads.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: no bundle ({MANIFEST_NAME} is missing); give a folder made by `crab-edge export`"
        ) from None
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: damaged (not JSON); {COPY_AGAIN}") from None
    if not isinstance(content, dict) or type(content.get("schema_version")) is not int:
        raise BundleError(f"{path}: damaged (no schema_version); {COPY_AGAIN}")
    schema = content["schema_version"]
    if schema != SCHEMA_VERSION:
        way = f"rebuild it with {REBUILD}"
        if schema > SCHEMA_VERSION:
            way = f"update with `pip install -U crab-edge` or {way}"
        writer = str(content.get("crab_edge"))[:20]
        raise BundleError(
            f"{path}: bundle schema {schema} (written by crab-edge {writer}), but crab-edge {__version__} "
            f"reads schema {SCHEMA_VERSION}; {way}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: damaged ({where}: {first['msg']}); {COPY_AGAIN}") from None
    if manifest.digest != content_digest(content):
        raise BundleError(f"{path}: damaged or edited (its content doesn't match its digest); {COPY_AGAIN}")
    return manifest

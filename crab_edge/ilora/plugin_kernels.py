"""Compiled kernels of I-LoRA's TensorRT plugins, as files beside an engine's graph.

    kernels.json            what `KernelSet`s there are, how each is launched
    <name>.<tactic>.ptx     one kernel each

The machine that builds the engine needs these files and no compiler. How a launch follows from the number of
rows is data (`Launch`), so the plugin's symbolic expressions, the tests and a launch by hand read the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crab_edge.errors import BundleError

from .ptx import entry

FILE = "kernels.json"
TACTICS = {"decode": 1, "prefill": 2}
"""Kernels of one product by the number that TensorRT knows them by. Each is right for any number of rows."""
DType = Literal["float16", "bfloat16", "float32", "int8"]
# A launch that takes more needs the caller to raise the kernel's limit first; nothing says that engines do.
MAX_SHARED = 48 * 1024


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Launch(_Strict):
    """How one kernel is launched on `rows` rows of activations.

    grid: three pairs (rows a block, blocks): ceil(rows / rows a block) * blocks, or only `blocks` where the
    first is null. threads a block, shared memory in bytes. arguments: the int32 scalars between input and
    output pointers, numbers or "rows".
    """

    entry: str
    grid: tuple[
        tuple[int | None, int],
        tuple[int | None, int],
        tuple[int | None, int],
    ]
    threads: int = Field(gt=0, le=1024, multiple_of=32)
    shared: int = Field(ge=0, le=MAX_SHARED)
    arguments: tuple[int | Literal["rows"], ...] = ("rows",)

    def blocks(self, rows: int) -> tuple[int, int, int]:
        """The grid for `rows` rows."""
        x, y, z = (count if tile is None else -(-rows // tile) * count for tile, count in self.grid)
        return x, y, z

    def scalars(self, rows: int) -> tuple[int, ...]:
        """The int32 arguments for `rows` rows."""
        return tuple(one if isinstance(one, int) else rows for one in self.arguments)


class KernelSet(_Strict):
    """The kernels of one product: same inputs and outputs, different ways of computing it.

    plugin: the operator; types: of its inputs in order, the output has the first one's; columns: width of the
    output [.., columns]. launches: by the names in `TACTICS`; sha256: of their PTX.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    plugin: str
    types: tuple[DType, ...] = Field(min_length=2)
    columns: int = Field(gt=0)
    launches: dict[Literal["decode", "prefill"], Launch] = Field(min_length=1)
    sha256: dict[Literal["decode", "prefill"], str]

    def file(self, tactic: str) -> str:
        """Name of the PTX file of a tactic."""
        return f"{self.name}.{tactic}.ptx"


class Kernels:
    """Kernel sets by name, with the PTX of each."""

    def __init__(self, sets: Iterable[KernelSet], ptx: Mapping[tuple[str, str], str]) -> None:
        self.sets = {one.name: one for one in sets}
        self.ptx = dict(ptx)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the PTX by `name.tactic`: what the manifest says lies in the engine."""
        return {
            f"{one.name}.{tactic}": digest
            for one in self.sets.values()
            for tactic, digest in sorted(one.sha256.items())
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes all files into `folder`; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for (name, tactic), text in sorted(self.ptx.items()):
            paths.append(folder / self.sets[name].file(tactic))
            paths[-1].write_text(text, encoding="utf-8")
        content = [one.model_dump(mode="json") for _, one in sorted(self.sets.items())]
        paths.append(folder / FILE)
        paths[-1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return paths


def digest(ptx: str) -> str:
    """SHA-256 (hex) of a PTX text."""
    return hashlib.sha256(ptx.encode()).hexdigest()


def read(folder: Path) -> Kernels:
    """Reads what `Kernels.write` wrote and checks it.

    BundleError when something is missing, changed, or doesn't fit what `kernels.json` says of it.
    """
    path = folder / FILE
    again = "export the target again"
    try:
        content = json.loads(path.read_bytes())
        sets = [KernelSet.model_validate(one) for one in content]
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; {again}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: damaged ({where}: {first['msg']}); {again}") from None
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: can't be read ({error}); {again}") from None
    ptx: dict[tuple[str, str], str] = {}
    for one in sets:
        for tactic, launch in one.launches.items():
            file = folder / one.file(tactic)
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, ValueError):
                raise BundleError(f"{file}: missing or unreadable; {again}") from None
            if digest(text) != one.sha256.get(tactic):
                raise BundleError(f"{file}: not the file that was exported (SHA-256 differs); {again}")
            problem = mismatch(text, launch, len(one.types))
            if problem:
                raise BundleError(f"{file}: {problem}; {again}")
            ptx[one.name, tactic] = text
    return Kernels(sets, ptx)


def mismatch(ptx: str, launch: Launch, inputs: int, outputs: int = 1) -> str | None:
    """What keeps TensorRT from launching this PTX so; None if it fits.

    TensorRT passes pointers to inputs, int32 scalars, pointers to outputs, and nothing else.
    """
    kernel = entry(ptx)
    if kernel.name != launch.entry:
        return f"holds the kernel {kernel.name}, expected {launch.entry}"
    if kernel.threads is not None and kernel.threads != launch.threads:
        return f"is compiled for {kernel.threads} threads a block, expected {launch.threads}"
    if re.search(r"griddepcontrol|cluster", ptx):
        return "needs a launch of clusters, or one that depends on another, which no engine makes"
    scalars = kernel.kinds[inputs : len(kernel.kinds) - outputs]
    pointers = kernel.kinds[:inputs] + kernel.kinds[len(kernel.kinds) - outputs :]
    if (
        set(pointers) - {"pointer"}
        or set(scalars) - {"u32", "s32", "b32"}
        or len(pointers) != inputs + outputs
    ):
        return f"takes ({', '.join(kernel.kinds)}), expected {inputs} pointers, scalars, {outputs} pointers"
    if len(scalars) != len(launch.arguments):
        return f"takes {len(scalars)} scalars, but {len(launch.arguments)} are passed"
    return None

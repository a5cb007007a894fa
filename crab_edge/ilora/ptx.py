"""What a kernel's PTX text says about itself, and PTX without parameters that nobody passes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from crab_edge.errors import CrabError

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(.*?)(\w+)\s*$", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A kernel: its name, its parameters in order as (name, kind), the PTX version (85 is 8.5), the target
    such as "sm_87", and threads a block if the text fixes them. A kind is "pointer" or a type such as "u32".
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    version: int
    target: str
    threads: int | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the parameters alone."""
        return tuple(kind for _, kind in self.parameters)


def entry(ptx: str) -> Entry:
    """The one kernel of a PTX text; CrabError when there is none or there are several."""
    found = _ENTRY.findall(ptx)
    version = re.search(r"^\.version\s+(\d+)\.(\d+)", ptx, re.MULTILINE)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if len(found) != 1 or version is None or target is None:
        raise CrabError(f"expected PTX of one kernel with a version and a target, found {len(found)} kernels")
    name, text = found[0]
    threads = re.search(r"^\s*\.(?:req|max)ntid\s+(\d+)", ptx, re.MULTILINE)
    return Entry(
        name,
        tuple(_parameter(part) for part in text.split(",") if part.strip()),
        10 * int(version[1]) + int(version[2]),
        target[1],
        int(threads[1]) if threads else None,
    )


def _parameter(text: str) -> tuple[str, str]:
    found = _PARAMETER.search(text.strip())
    if found is None:
        raise CrabError(f"can't read the PTX parameter {text.strip()!r}")
    kind, rest, name = found.groups()
    # Without a `.ptr`, a 64-bit parameter may be an address as well; Triton marks its pointers.
    return name, "pointer" if kind == "u64" and ".ptr" in rest else kind


def without_trailing(ptx: str, count: int) -> str:
    """The same kernel without its last `count` parameters; CrabError when its body reads them.

    Triton appends pointers to scratch memory to every kernel. A caller that doesn't know of them, such as
    TensorRT with a kernel of an engine, hands over fewer arguments than the kernel declares, and the driver
    reads past their end.
    """
    if not count:
        return ptx
    kernel = entry(ptx)
    if count > len(kernel.parameters):
        raise CrabError(f"{kernel.name} has {len(kernel.parameters)} parameters, can't leave out {count}")
    head = _ENTRY.search(ptx)
    assert head is not None
    body = ptx[head.end() :]
    for name, _ in kernel.parameters[-count:]:
        if re.search(rf"\b{name}\b", body):
            raise CrabError(f"{kernel.name} reads its parameter {name}, which nobody passes")
    kept = [part for part in head[2].split(",") if part.strip()][:-count]
    return ptx[: head.start(2)] + ",".join(kept).rstrip() + "\n" + ptx[head.end(2) :]

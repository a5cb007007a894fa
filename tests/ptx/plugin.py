"""A plugin's kernel launched on the machine as `crab_edge.ilora.ptx_launch` launches it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from crab_edge.ilora.plugin_kernels import Kernels
from tests.ptx.machine import launch
from tests.ptx.memory import Global


def run(
    kernels: Kernels, name: str, tactic: str, rows: int, inputs: Sequence[NDArray[Any]], out: NDArray[Any]
) -> NDArray[Any]:
    """The output, of `out`'s type and shape: arguments in TensorRT's order, grid by what the set says."""
    how = kernels.sets[name].launches[tactic]  # type: ignore[index]
    memory = Global()
    addresses = [memory.put(one) for one in inputs]
    result = memory.put(out, written=False)
    arguments = [*addresses, *how.scalars(rows), result]
    launch(kernels.ptx[name, tactic], memory, arguments, how.blocks(rows), how.threads, how.shared)
    return memory.get(result, out)

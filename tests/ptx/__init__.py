"""A machine that executes PTX instruction by instruction, so that kernels run where there is no GPU.

It takes the text that a driver would compile, launched as a driver would (grid, threads, bytes of shared
memory, arguments in order), and is stricter than a GPU: see `launch`. It knows the instructions that this
project's kernels hold and refuses others by name. Source of what each does: NVIDIA, PTX ISA 9.0.

    parse        the text
    memory       global and shared memory, with what may not be done to them
    arithmetic   instructions of one thread
    warps        instructions of a whole warp
    machine      registers, branches, barriers, copies
    count        what a launch asks of a multiprocessor
    plugin, jit  launches as TensorRT makes them, as Triton makes them
"""

from tests.ptx.machine import launch
from tests.ptx.memory import Global
from tests.ptx.parse import PtxError

__all__ = ["Global", "PtxError", "launch"]

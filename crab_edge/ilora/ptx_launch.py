"""A plugin's kernel launched by hand as an engine launches it: the same PTX, grid and order of arguments.

Only the driver is needed. For tests and for `doctor`: where a kernel works here and not in an engine, the
engine passes something else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crab_edge.ilora.plugin_kernels import Kernels

if TYPE_CHECKING:
    from crab_edge.engines._cuda import Device, Memory


class Kernel:
    """One tactic of a kernel set, compiled by the driver for its GPU.

    `device` is current in this thread. EngineError or DeviceError when the driver refuses the PTX.
    """

    def __init__(self, device: Device, kernels: Kernels, name: str, tactic: str) -> None:
        from crab_edge.engines._cuda import driver

        self._driver = driver()
        self._device = device
        self.set = kernels.sets[name]
        self.how = self.set.launches[tactic]  # type: ignore[index]
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        text = kernels.ptx[name, tactic].encode() + b"\0"
        self._driver.call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(text))
        entry = ctypes.c_char_p(self.how.entry.encode())
        self._driver.call("cuModuleGetFunction", ctypes.byref(self._function), self._module, entry)

    def launch(self, rows: int, inputs: Sequence[Memory], output: Memory) -> None:
        """Puts one launch on `rows` rows into the device's stream.

        Arguments in TensorRT's order: addresses of the inputs, int32 scalars, address of the output.
        """
        values: list[ctypes.c_uint64 | ctypes.c_int32] = [ctypes.c_uint64(one.address) for one in inputs]
        values += [ctypes.c_int32(one) for one in self.how.scalars(rows)]
        values.append(ctypes.c_uint64(output.address))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(one) for one in values])
        sizes = (*self.how.blocks(rows), self.how.threads, 1, 1, self.how.shared)
        self._driver.call(
            "cuLaunchKernel",
            self._function,
            *[ctypes.c_uint(one) for one in sizes],
            ctypes.c_void_p(self._device.stream),
            pointers,
            None,
        )

    def close(self) -> None:
        """Unloads the kernel."""
        module, self._module = self._module, ctypes.c_void_p()
        if module:
            self._driver.call("cuModuleUnload", module)

"""Global and shared memory that notice what a GPU would let pass: strays, reads of nothing, races."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parse import PtxError

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
Count = Callable[[Places, NDArray[Any], int], None]

_GLOBAL, _APART = 1 << 40, 1 << 32
SHARED = 1024
"""Where shared memory begins: addresses near zero are mistakes."""


class Global:
    """Device memory: arrays put into it, 4 GiB from each other, so that a stray from one meets no other.

    Loads of what the same launch stored aren't looked at: no race is noticed here.
    """

    def __init__(self) -> None:
        self._data = np.zeros(0, np.uint8)
        self._written, self._stored = (np.zeros(0, bool) for _ in range(2))
        # Where each array begins in the bytes above, and how many it has.
        self._starts, self._sizes = (np.zeros(0, np.int64) for _ in range(2))

    def put(self, array: NDArray[Any], written: bool = True) -> int:
        """The address of a copy of the array; with written=False nothing may read it before it is stored."""
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self._starts = np.append(self._starts, len(self._data))
        self._sizes = np.append(self._sizes, data.size)
        self._data = np.concatenate([self._data, data])
        self._written = np.concatenate([self._written, np.full(data.size, written)])
        self._stored = np.concatenate([self._stored, np.zeros(data.size, bool)])
        return _GLOBAL + (len(self._starts) - 1) * _APART

    def get(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        """What lies at an address, as an array of `like`'s type and shape, all of it written."""
        start = int(self._starts[(address - _GLOBAL) // _APART]) + (address - _GLOBAL) % _APART
        if not self._written[start : start + like.nbytes].all():
            missing = int((~self._written[start : start + like.nbytes]).sum())
            raise PtxError(f"{missing} of {like.nbytes} bytes were never stored")
        raw = self._data[start : start + like.nbytes].tobytes()
        return np.frombuffer(raw, like.dtype).reshape(like.shape).copy()

    def load(self, address: NDArray[np.uint64], size: int) -> Bytes:
        """[threads, size]."""
        place = self._place(address, size)
        if not self._written[place].all():
            raise PtxError("a read of memory that nothing was stored to")
        return self._data[place]

    def store(self, address: NDArray[np.uint64], data: Bytes) -> None:
        """data [threads, size]; a byte that is stored twice must be stored the same."""
        place = self._place(address, data.shape[1])
        again = self._stored[place]
        before = self._data[place]
        self._data[place] = data
        if (again & (before != data)).any() or (self._data[place] != data).any():
            raise PtxError("two stores of different values to one address")
        self._written[place] = self._stored[place] = True

    def _place(self, address: NDArray[np.uint64], size: int) -> Places:
        array, start = np.divmod(address.astype(np.int64) - _GLOBAL, _APART)
        if (start % size).any():
            raise PtxError(f"an access of {size} bytes at an address that isn't a multiple of them")
        known = (array >= 0) & (array < len(self._starts))
        if not known.all() or (start + size > self._sizes[array]).any():
            raise PtxError(f"an access of {size} bytes outside of every array")
        return (self._starts[array] + start)[:, None] + np.arange(size)


class Shared:
    """Shared memory of several blocks side by side.

    Between two barriers a byte that one warp writes may not be read or otherwise written by another, nor a
    byte that one reads be written by another; a byte that a copy is on its way to may not be touched at all.
    The lanes of a warp go in step here, so what they need among themselves isn't looked at.
    """

    def __init__(self, blocks: int, size: int, count: Count = lambda *access: None) -> None:
        self._size = size
        self._count = count
        self._data = np.zeros(blocks * size, np.uint8)
        self._written = np.zeros(blocks * size, bool)
        self._coming = np.zeros(blocks * size, bool)
        self._arriving = np.zeros(blocks * size, np.uint8)
        # Warp and interval between barriers of the last access; warps are numbered through all blocks.
        self._writer, self._reader = (np.full(blocks * size, -1, np.int32) for _ in range(2))
        self._wrote, self._read = (np.full(blocks * size, -1, np.int32) for _ in range(2))
        self._interval = np.zeros(blocks, np.int32)

    def barrier(self, blocks: NDArray[np.int64]) -> None:
        """All of a block's threads have come to a barrier."""
        self._interval[blocks] += 1

    def load(self, block: Places, warp: Places, address: NDArray[Any], size: int) -> Bytes:
        """[threads, size] of each thread's own block."""
        place = self._place(block, address, size)
        self._count(warp, address, size)
        if self._coming[place].any():
            raise PtxError("a read of shared memory that a copy is still on its way to")
        if not self._written[place].all():
            raise PtxError("a read of shared memory that nothing was written to")
        now = self._interval[block][:, None]
        self._check((self._wrote[place] == now) & (self._writer[place] != warp[:, None]), "read", "wrote")
        # Of several readers in an interval it is enough to know that there were several.
        several = (self._read[place] == now) & (self._reader[place] != warp[:, None])
        self._reader[place] = warp[:, None]
        several |= self._reader[place] != warp[:, None]
        self._reader[place[several]] = -2
        self._read[place] = now
        return self._data[place]

    def store(self, block: Places, warp: Places, address: NDArray[Any], data: Bytes) -> None:
        """data [threads, size]."""
        place = self._place(block, address, data.shape[1])
        self._count(warp, address, data.shape[1])
        self._claim(block, warp, place, data)
        self._data[place] = data
        if (self._data[place] != data).any():
            raise PtxError("two threads write different values to one place of shared memory")
        self._written[place] = True

    def begin_copy(self, block: Places, warp: Places, address: NDArray[Any], data: Bytes) -> None:
        """A copy sets out for `address`."""
        place = self._place(block, address, data.shape[1])
        self._count(warp, address, data.shape[1])
        self._claim(block, warp, place, data)
        self._arriving[place] = data
        if (self._arriving[place] != data).any():
            raise PtxError("two threads copy different values to one place of shared memory")
        self._coming[place] = True

    def end_copy(self, block: Places, warp: Places, address: NDArray[Any], data: Bytes) -> None:
        """The copy is there, for the thread that waited for it; others need a barrier."""
        place = self._place(block, address, data.shape[1])
        self._data[place] = data
        self._coming[place], self._written[place] = False, True
        self._writer[place] = warp[:, None]
        self._wrote[place] = self._interval[block][:, None]

    def _claim(self, block: Places, warp: Places, place: Places, data: Bytes) -> None:
        now, mine = self._interval[block][:, None], warp[:, None]
        if self._coming[place].any():
            raise PtxError("a write to shared memory that a copy is still on its way to")
        self._check((self._read[place] == now) & (self._reader[place] != mine), "write", "read")
        other = (self._wrote[place] == now) & (self._writer[place] != mine)
        self._check(other & (self._data[place] != data), "write", "wrote")
        self._writer[place], self._wrote[place] = mine, now

    @staticmethod
    def _check(conflict: NDArray[np.bool_], one: str, other: str) -> None:
        if conflict.any():
            raise PtxError(
                f"a race: a {one} of shared memory that another warp {other} since the last barrier"
            )

    def _place(self, block: Places, address: NDArray[Any], size: int) -> Places:
        start = address.astype(np.int64) - SHARED
        if (start % size).any():
            raise PtxError(f"an access of {size} bytes of shared memory at an address not a multiple of them")
        if ((start < 0) | (start + size > self._size)).any():
            raise PtxError(f"an access outside of the {self._size} bytes of shared memory")
        return (block * self._size + start)[:, None] + np.arange(size)

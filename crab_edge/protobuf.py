"""Protocol Buffers' wire format: enough to read a few fields of a message and to write some.

The runtime looks into ONNX files with it where the package `onnx` would be a dependency for one small job. A
message is a sequence of fields, each a number and a value; fields of no interest are skipped unread.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, I64, LENGTH, I32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field in order: an int for varints (unsigned), else the value's bytes.

    ValueError where the bytes are no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == LENGTH:
            size, at = _varint(message, at)
        elif kind in (I64, I32):
            size = 8 if kind == I64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without an end at byte {at}")


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: an int (int64, as varint), or a text, bytes or a message (with its length)."""
    if isinstance(value, int):
        return _number(number << 3 | VARINT) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | LENGTH) + _number(len(data)) + data


def _number(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative ones are written as their two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

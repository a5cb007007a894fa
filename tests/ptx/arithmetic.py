"""What instructions of one thread compute, on arrays of all threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parse import PtxError

Array = NDArray[Any]

_INTEGERS = {"s": np.int64, "u": np.uint64, "b": np.uint64}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
# What may stand between name and type; anything else (saturation, carries, other rounding) is refused. With
# ftz a GPU makes zeros of numbers below 2^-126, here they stay.
_MODIFIERS = {
    "add": {"rn"}, "sub": {"rn"}, "mul": {"rn", "lo", "hi", "wide"}, "mad": {"lo", "wide"}, "fma": {"rn"},
    "div": {"full", "rn"}, "ex2": {"approx", "ftz"}, "sqrt": {"approx", "ftz", "rn"}, "rsqrt": {"approx"},
    "rcp": {"approx", "rn"},
}  # fmt: skip


def view(bits: Array, kind: str) -> Array:
    """Registers as numbers: s32, u16, b64, f32, f16, bf16; f16x2 and the like with two in the last axis."""
    if kind == "pred":
        return bits
    if kind.endswith("x2"):
        half = kind[:-2]
        size = 8 * int(_size(half))
        low = bits & np.array((1 << size) - 1, bits.dtype)
        return np.stack(
            [view(part.astype(f"u{size // 8}"), half) for part in (low, bits >> np.array(size, bits.dtype))],
            -1,
        )
    size = _size(kind)
    bits = bits.astype(f"u{size}") if bits.dtype != bool else bits.astype("u1")
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind[0] == "f":
        return np.ascontiguousarray(bits).view(f"f{size}")
    return bits.view(f"i{size}") if kind[0] == "s" else bits


def bits(value: Array, kind: str) -> Array:
    """Numbers as registers: the inverse of `view`, floats rounded to the nearest even, integers cut off."""
    if kind == "pred":
        return value.astype(bool)
    if kind.endswith("x2"):
        half = kind[:-2]
        size = 8 * _size(half)
        wide = np.dtype(f"u{size // 4}")
        low, high = (bits(value[..., i], half).astype(wide) for i in (0, 1))
        return low | high << np.array(size, wide)
    size = _size(kind)
    if kind == "bf16":
        raw = value.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (raw + 0x7FFF + (raw >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    if kind[0] == "f":
        return value.astype(f"f{size}").view(f"u{size}")
    return value.astype(f"i{size}" if value.dtype.kind == "i" else f"u{size}").view(f"u{size}")


def _size(kind: str) -> int:
    """Bytes."""
    return int(kind.lstrip("bfsu").partition("x")[0]) // 8


def compute(parts: tuple[str, ...], a: list[Array]) -> tuple[Array, str]:
    """The result, and its type, of an arithmetic instruction on registers `a`."""
    name, kind = parts[0], parts[-1]
    if parts[:-1] == ("add", "rn", "f32") and kind in ("f16", "bf16"):
        # Of one operand in half precision and one in single.
        return view(a[0], kind).astype(np.float32) + view(a[1], "f32"), "f32"
    if set(parts[1:-1]) - _MODIFIERS.get(name, set()):
        raise PtxError(f"{'.'.join(parts)} isn't known")
    if kind[0] == "f" or kind.startswith("bf"):
        return _floats(name, kind, [view(one, kind) for one in a]), kind
    if name in ("mul", "mad"):
        return _multiply(name, parts[1], kind, a)
    numbers = [view(one, kind) for one in a]
    return _integers(name, kind, numbers, a), kind


def _floats(name: str, kind: str, a: list[Array]) -> Array:
    exact = [one.astype(np.float64) for one in a]
    if name in ("add", "sub", "mul", "fma", "mad", "div"):
        if name in ("fma", "mad"):
            value = exact[0] * exact[1] + exact[2]
        else:
            left, right = exact
            value = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name](
                left, right
            )
    elif name in ("max", "min"):
        # From sm_100 on there may be three.
        value = functools.reduce(np.fmax if name == "max" else np.fmin, exact)
    elif name == "ex2":
        value = np.exp2(exact[0])
    elif name in ("sqrt", "neg", "abs"):
        value = {"sqrt": np.sqrt, "neg": np.negative, "abs": np.abs}[name](exact[0])
    elif name == "rcp":
        value = 1 / exact[0]
    elif name == "rsqrt":
        value = 1 / np.sqrt(exact[0])
    else:
        raise PtxError(f"no arithmetic {name}.{kind}")
    return value if kind == "bf16" or kind.startswith("bf16") else value.astype(a[0].dtype)


def _multiply(name: str, half: str, kind: str, a: list[Array]) -> tuple[Array, str]:
    size = _size(kind)
    wide = kind[0] + str(size * 16)
    if size == 8:
        if half != "lo":
            raise PtxError(f"no {name}.{half}.{kind}")
        product = a[0].astype(np.uint64) * a[1].astype(np.uint64)
        return (product + a[2] if name == "mad" else product), kind
    product = view(a[0], kind).astype(_INTEGERS[kind[0]]) * view(a[1], kind).astype(_INTEGERS[kind[0]])
    if half == "wide":
        result, to = product, wide
    elif half == "hi":
        result, to = product >> np.array(8 * size, product.dtype), kind
    else:
        result, to = product, kind
    if name == "mad":
        result = result + view(a[2], to).astype(result.dtype)
    return result, to


def _integers(name: str, kind: str, a: list[Array], raw: list[Array]) -> Array:
    size = 8 * (0 if kind == "pred" else _size(kind))
    if name in ("add", "sub"):
        return a[0] + a[1] if name == "add" else a[0] - a[1]
    if name in ("and", "or", "xor"):
        left, right = a
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](left, right)
    if name == "not":
        return ~a[0]
    if name in ("min", "max"):
        return functools.reduce(np.minimum if name == "min" else np.maximum, a)
    if name == "neg":
        return -a[0]
    if name in ("shl", "shr"):
        by = view(raw[1], "u32")
        clamped = np.minimum(by, size - 1).astype(a[0].dtype)
        if name == "shl":
            return np.where(by < size, a[0] << clamped, np.zeros((), a[0].dtype))
        gone = np.zeros((), a[0].dtype) if kind[0] != "s" else a[0] >> np.array(size - 1, a[0].dtype)
        return np.where(by < size, a[0] >> clamped, gone)
    if name == "bfe":
        return _bit_field(a[0], view(raw[1], "u32") & 255, view(raw[2], "u32") & 255, kind)
    if name == "prmt":
        return _permute(a)
    if name == "lop3":
        return _look_up(a)
    if name in ("div", "rem") and size == 32:
        quotient = np.trunc(a[0].astype(np.float64) / a[1]).astype(a[0].dtype)
        return quotient if name == "div" else a[0] - quotient * a[1]
    raise PtxError(f"no arithmetic {name}.{kind}")


def _bit_field(value: Array, start: Array, length: Array, kind: str) -> Array:
    size = 8 * _size(kind)
    if ((start + length) > size).any() or (length == 0).any():
        raise PtxError("bfe of bits that aren't there isn't known")
    plain = f"u{size // 8}"
    moved = (value.view(plain) << (size - start - length).astype(plain)).view(value.dtype)
    return moved >> (size - length).astype(value.dtype)


def _permute(a: list[Array]) -> Array:
    source = np.stack([a[0], a[1]], -1).astype("<u4").view(np.uint8).reshape(len(a[0]), 8)
    result = np.zeros((len(a[0]), 4), np.uint8)
    for i in range(4):
        pick = (a[2] >> np.uint32(4 * i)) & 15
        byte = np.take_along_axis(source, (pick & 7)[:, None].astype(np.int64), 1)[:, 0]
        result[:, i] = np.where(pick & 8, np.where(byte & 128, 255, 0), byte)
    return result.view("<u4")[:, 0]


def _look_up(a: list[Array]) -> Array:
    table = int(a[3][0])
    result = np.zeros_like(a[0])
    for case in range(8):
        if table >> case & 1:
            chosen = [one if case >> shift & 1 else ~one for one, shift in zip(a[:3], (2, 1, 0), strict=True)]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def compare(parts: tuple[str, ...], a: Array, b: Array) -> Array:
    """setp.OP.TYPE: a comparison with a NaN is false but for the unordered ones (ltu, neu, ..)."""
    name, kind = parts[1], parts[2]
    if len(parts) != 3:
        raise PtxError(f"{'.'.join(parts)} isn't known")
    floating = kind[0] == "f" or kind.startswith("bf")
    if floating and len(name) == 3 and name.endswith("u"):
        x, y = view(a, kind), view(b, kind)
        return _COMPARE[name[:2]](x, y) | np.isnan(x) | np.isnan(y)
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    if name not in _COMPARE:
        raise PtxError(f"{'.'.join(parts)} isn't known")
    x, y = view(a, kind), view(b, kind)
    result = _COMPARE[name](x, y)
    return result & ~(np.isnan(x) | np.isnan(y)) if floating else result


def convert(parts: tuple[str, ...], a: list[Array]) -> tuple[Array, str]:
    """cvt: the value and its type."""
    to, source = parts[-2], parts[-1]
    rounding = {"rzi", "rni"} if to[0] in "su" and "f" in source else {"rn"} if "f" in to else set()
    if set(parts[1:-2]) - rounding:
        raise PtxError(f"{'.'.join(parts)} isn't known")
    if to.endswith("x2"):
        # The first operand gives the upper half.
        return np.stack([view(a[1], source), view(a[0], source)], -1), to
    value = view(a[0], source)
    integral = to[0] in "su"
    if integral and value.dtype.kind == "f":
        limits = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{_size(to)}")
        whole = np.trunc(value) if "rzi" in parts else np.rint(value)
        value = np.clip(np.nan_to_num(whole.astype(np.float64)), limits.min, limits.max).astype(np.int64)
    elif integral:
        value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64)
    return value, to

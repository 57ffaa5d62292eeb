"""Memory of compiled loops: by its address, on the stack, of the C library. None is numba's, for them to do without it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

from onnxq.compiled import PREFIX

# Compiled into what calls it, so without wrappers for Python; raises nothing.
WITHOUT_WRAPPERS: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # which numba's types do not know
part: Any = numba.njit(nogil=True, error_model="numpy", **WITHOUT_WRAPPERS)
HEAD = object.__basicsize__  # bytes of an object of Python's before what is its own
BYTE, WORD = ir.IntType(8), ir.IntType(64)


def at(kind: Any) -> Any:
    """What gives the place in memory of an address, for `carray`."""
    pointer = types.CPointer(numba.from_dtype(np.dtype(kind)))

    @intrinsic
    def place(typing, address):
        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), code

    return place


def on_stack(size: int) -> Any:
    """What gives the address of so many bytes on the stack; of the same ones each time in one call of a loop."""

    @intrinsic
    def place(typing):
        def code(context, builder, signature, arguments):
            found = cgutils.alloca_once(builder, ir.ArrayType(WORD, (size + 7) // 8))
            return builder.ptrtoint(found, WORD)

        return types.int64(), code

    return place


def allotting() -> Any:
    @intrinsic
    def allot(typing, sizes):
        """The addresses of so many bytes each, of the C library; 0 for what it does not have."""

        def code(context, builder, signature, arguments):
            kind = ir.FunctionType(BYTE.as_pointer(), [WORD])
            malloc = cgutils.get_or_insert_function(builder.module, kind, "malloc")
            found = [builder.call(malloc, [size]) for size in cgutils.unpack_tuple(builder, arguments[0])]
            return context.make_tuple(builder, signature.return_type, [builder.ptrtoint(f, WORD) for f in found])

        return types.UniTuple(types.int64, len(sizes))(sizes), code

    return allot


def releasing() -> Any:
    @intrinsic
    def release(typing, addresses):
        """Give back what was allotted."""

        def code(context, builder, signature, arguments):
            free = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [BYTE.as_pointer()]), "free"
            )
            for address in cgutils.unpack_tuple(builder, arguments[0]):
                builder.call(free, [builder.inttoptr(address, BYTE.as_pointer())])
            return context.get_dummy_value()

        return types.void(addresses), code

    return release


def loop_of(name: str, number: int) -> Any:
    """What calls another loop, of so many int64, by its name: so it is compiled once, and not into each that calls it."""

    @intrinsic
    def call(typing, arguments):
        def code(context, builder, signature, values):
            kind = ir.FunctionType(WORD, [WORD] * number)
            function = cgutils.get_or_insert_function(builder.module, kind, PREFIX + name)
            return builder.call(function, cgutils.unpack_tuple(builder, values[0]))

        return types.int64(arguments), code

    return call


def calling() -> Any:
    @intrinsic
    def call(typing, function, arguments):
        """Call a C function of some int64, by its address."""

        def code(context, builder, signature, values):
            kind = ir.FunctionType(WORD, [WORD] * len(arguments))
            place = builder.inttoptr(values[0], kind.as_pointer())
            return builder.call(place, cgutils.unpack_tuple(builder, values[1]))

        return types.int64(types.int64, arguments), code

    return call


allot, release, call = allotting(), releasing(), calling()
at_float32, at_float64, at_uint16, at_uint32, at_uint64 = at("f4"), at("f8"), at("u2"), at("u4"), at("u8")
at_int16, at_int32, at_int64 = at("i2"), at("i4"), at("i8")


@part
def is_there(addresses):  # whether all was allotted
    for address in addresses:  # noqa: SIM110
        if address == 0:
            return False
    return True


@part
def word_at(address):
    return carray(at_int64(address), (1,))[0]


@part
def data_of(array):  # the address of the elements of numpy's array that is at an address, as its C API lays it out
    return word_at(array + HEAD)


@part
def length_of(array, axis):
    return word_at(word_at(array + HEAD + 16) + 8 * axis)


@part
def floats(x):  # the elements of a contiguous array, in one row
    return carray(at_float32(x.ctypes.data), (x.size,))


@part
def bits_of(x):  # the same as bit patterns
    return carray(at_uint32(x.ctypes.data), (x.size,))

"""Loops over vectors of WIDE elements, written as numba cannot be made to write them, for counting.py.

What numba makes of a loop over few rows spends more time before it and after it than in it, and it knows no instruction
that packs some elements of a vector. LLVM makes of a vector of this width what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDE = 16  # one vector of AVX-512, two of AVX2, four of NEON
BIT, INT16, INT32, INT64, DOUBLE = *(ir.IntType(n) for n in (1, 16, 32, 64)), ir.DoubleType()


def over_rows(kind: ir.Type, step: Callable[..., list[ir.Value]], *, partly: bool = False) -> Any:
    """What goes over rows of memory, WIDE elements of each, with vectors of a kind that are in memory before and after.

    Its arguments are the address of the first element, the number of rows, the bytes from one to the next, the addresses of
    the vectors, numbers that each step is given besides, and how many elements of each row there are, if `partly`; zeros are
    in place of the others.
    """

    @intrinsic
    def go(typing, source, rows, stride, places, numbers, some):
        def code(context, builder, signature, values):
            start, (source, rows, stride, places, numbers, some) = builder.block, values
            given = [splat(builder, n) for n in cgutils.unpack_tuple(builder, numbers)]
            at = [builder.inttoptr(p, vector(kind).as_pointer()) for p in cgutils.unpack_tuple(builder, places)]
            loop, body, end = (builder.append_basic_block(name) for name in ("rows", "row", "end"))
            first = [builder.load(p, align=4) for p in at]
            some = builder.icmp_signed("<", ir.Constant(vector(INT64), list(range(WIDE))), splat(builder, some))
            builder.branch(loop)
            builder.position_at_end(loop)
            row, place, *held = [builder.phi(INT64), builder.phi(INT64), *(builder.phi(vector(kind)) for _ in at)]
            builder.cbranch(builder.icmp_signed("<", row, rows), body, end)
            builder.position_at_end(body)
            pointer = builder.inttoptr(place, vector(INT32).as_pointer())
            elements = load_some(builder, pointer, some) if partly else builder.load(pointer, align=4)
            made = step(builder, elements, held, given)
            ahead = [builder.add(row, INT64(1)), builder.add(place, stride), *made]
            for value, before, after in zip([row, place, *held], [INT64(0), source, *first], ahead, strict=True):
                value.add_incoming(before, start)
                value.add_incoming(after, body)
            builder.branch(loop)
            builder.position_at_end(end)
            for value, pointer in zip(held, at, strict=True):
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(source, rows, stride, places, numbers, some), code

    return go


def load_some(builder: Any, pointer: Any, some: ir.Value) -> ir.Value:
    """The elements (WIDE,) int32 in memory of which `some` (WIDE,) says that they are there, and zeros."""
    name = f"llvm.masked.load.v{WIDE}i32.p0"
    kind = ir.FunctionType(vector(INT32), [pointer.type, INT32, vector(BIT), vector(INT32)])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [pointer, INT32(4), some, every(0)])


def vector(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, WIDE)


def splat(builder: Any, value: Any) -> ir.Value:
    """A vector of one value over and over."""
    empty = vector(value.type)(ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, INT32(0)), empty, every(0))


def every(number: int) -> ir.Constant:
    return ir.Constant(vector(INT32), [number] * WIDE)


def span_step(b: Any, bits: ir.Value, held: list[ir.Value], _: list[ir.Value]) -> list[ir.Value]:
    """Least and largest key so far, and the least magnitude less one, see `key` and `magnitude`."""
    least, most, near = held
    keys = b.xor(bits, b.and_(b.ashr(bits, every(31)), every(0x7FFFFFFF)))
    size = b.sub(b.and_(bits, every(0x7FFFFFFF)), every(1))
    return [
        b.select(b.icmp_signed("<", keys, least), keys, least),
        b.select(b.icmp_signed(">", keys, most), keys, most),
        b.select(b.icmp_unsigned("<", size, near), size, near),
    ]


def sum_step(b: Any, bits: ir.Value, held: list[ir.Value], numbers: list[ir.Value]) -> list[ir.Value]:
    """The sums so far of `anchored(x, anchor)`, or of `anchored(rest_of(x, above), anchor)` where two numbers are given."""
    x = b.fpext(b.bitcast(bits, vector(ir.FloatType())), vector(DOUBLE))
    for above in numbers[:-1]:
        x = b.fsub(x, b.fsub(b.fadd(x, above), above))
    return [b.add(held[0], b.bitcast(b.fadd(x, numbers[-1]), vector(INT64)))]


span_rows, sum_rows = over_rows(INT32, span_step), over_rows(INT64, sum_step)
span_some, sum_some = over_rows(INT32, span_step, partly=True), over_rows(INT64, sum_step, partly=True)


@intrinsic
def squeezing(typing, source, number, target):
    """Write the bins but 0 of elements, a number that fills vectors, as uint16; how many, or -1 where that is slow."""

    def code(context, builder, signature, values):
        if "+avx512f" not in context.codegen().magic_tuple()[2] or llvm_version_info[0] < 19:
            return INT64(-1)
        start, (source, number, target) = builder.block, values
        kind = ir.FunctionType(vector(INT32), [vector(INT32), vector(BIT), vector(INT32)])
        compress = cgutils.get_or_insert_function(builder.module, kind, f"llvm.experimental.vector.compress.v{WIDE}i32")
        loop, body, end = (builder.append_basic_block(name) for name in ("vectors", "vector", "end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        done, found = builder.phi(INT64), builder.phi(INT64)
        builder.cbranch(builder.icmp_signed("<", done, number), body, end)
        builder.position_at_end(body)
        place = builder.add(source, builder.shl(done, INT64(2)))
        bins = builder.lshr(builder.load(builder.inttoptr(place, vector(INT32).as_pointer()), align=4), every(16))
        some = builder.icmp_unsigned("!=", bins, every(0))
        packed = builder.trunc(builder.call(compress, [bins, some, every(0)]), vector(INT16))
        place = builder.add(target, builder.shl(found, INT64(1)))
        builder.store(packed, builder.inttoptr(place, vector(INT16).as_pointer()), align=2)
        more = builder.zext(builder.ctpop(builder.bitcast(some, ir.IntType(WIDE))), INT64)
        for value, after in ((done, builder.add(done, INT64(WIDE))), (found, builder.add(found, more))):
            value.add_incoming(INT64(0), start)
            value.add_incoming(after, body)
        builder.branch(loop)
        builder.position_at_end(end)
        return found

    return types.int64(source, number, target), code


squeeze: Any = squeezing  # the first argument of which is numba's

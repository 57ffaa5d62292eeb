"""Loops over vectors of WIDE elements, written as numba cannot be made to write them, for counting.py.

What numba makes of a loop over few rows spends more time before it and after it than in it, and it knows no instruction
that packs some elements of a vector. LLVM makes of a vector of this width what the processor has. An addition to a count
keeps the processor from others for a cycle, and from little else: so vectors are worked on between additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba.core import cgutils, types
from numba.extending import intrinsic

from onnxq.compiled import TABLES

WIDE = 16  # one vector of AVX-512, two of AVX2, four of NEON
AT_ONCE = 8  # bins that are counted beside a vector
BIT, INT16, INT32, INT64, DOUBLE = *(ir.IntType(n) for n in (1, 16, 32, 64)), ir.DoubleType()
PAIR = types.UniTuple(types.int64, 2)


def repeat(b: Any, number: ir.Value, first: list[Any], step: Callable[..., list[Any]]) -> list[Any]:
    """What becomes of some values in so many steps: `step` makes of the number of the step, and of them, the next ones."""
    start, loop, body, end = b.block, *(b.append_basic_block(name) for name in ("loop", "step", "end"))
    b.branch(loop)
    b.position_at_end(loop)
    done, *held = [b.phi(value.type) for value in (INT64(0), *first)]
    b.cbranch(b.icmp_signed("<", done, number), body, end)
    b.position_at_end(body)
    made = [b.add(done, INT64(1)), *step(done, held)]
    for value, before, after in zip([done, *held], [INT64(0), *first], made, strict=True):
        value.add_incoming(before, start)
        value.add_incoming(after, b.block)
    b.branch(loop)
    b.position_at_end(end)
    return held


def at(b: Any, address: ir.Value, kind: ir.Type, offset: ir.Value | None = None) -> ir.Value:
    """The place in memory that an address, and so many bytes, is."""
    return b.inttoptr(address if offset is None else b.add(address, offset), kind.as_pointer())


def vector(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, WIDE)


def splat(b: Any, value: Any) -> ir.Value:
    """A vector of one value over and over."""
    empty = vector(value.type)(ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, value, INT32(0)), empty, every(0))


def every(number: int) -> ir.Constant:
    return ir.Constant(vector(INT32), [number] * WIDE)


def in_memory(b: Any, kind: ir.Type, places: ir.Value, work: Callable[[list[ir.Value]], list[ir.Value]]) -> None:
    """Let `work` make new vectors of those that are in memory at some places."""
    pointers = [at(b, place, vector(kind)) for place in cgutils.unpack_tuple(b, places)]
    made = work([b.load(pointer, align=4) for pointer in pointers])
    for value, pointer in zip(made, pointers, strict=True):
        b.store(value, pointer, align=4)


def over_rows(kind: ir.Type, step: Callable[..., list[ir.Value]], *, partly: bool = False) -> Any:
    """What goes over rows of memory, WIDE elements of each, with vectors of a kind that are in memory before and after.

    Its arguments are the address of the first element, the number of rows, the bytes from one to the next, the addresses of
    the vectors, numbers that each step is given besides, and how many elements of each row there are, if `partly`; zeros are
    in place of the others.
    """

    @intrinsic
    def go(typing, source, rows, stride, places, numbers, some):
        def code(context, b, signature, values):
            source, rows, stride, places, numbers, some = values
            given = [splat(b, n) for n in cgutils.unpack_tuple(b, numbers)]
            some = b.icmp_signed("<", ir.Constant(vector(INT64), list(range(WIDE))), splat(b, some))

            def row(k, held):
                pointer = at(b, source, vector(INT32), b.mul(k, stride))
                return step(b, load_some(b, pointer, some) if partly else b.load(pointer, align=4), held, given)

            in_memory(b, kind, places, lambda first: repeat(b, rows, first, row))
            return context.get_dummy_value()

        return types.void(source, rows, stride, places, numbers, some), code

    return go


def load_some(b: Any, pointer: Any, some: ir.Value) -> ir.Value:
    """The elements (WIDE,) int32 in memory of which `some` (WIDE,) says that they are there, and zeros."""
    name = f"llvm.masked.load.v{WIDE}i32.p0"
    kind = ir.FunctionType(vector(INT32), [pointer.type, INT32, vector(BIT), vector(INT32)])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [pointer, INT32(4), some, every(0)])


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


def count_upper(b: Any, source: ir.Value, words: int, bits: int, tables: ir.Value, stride: ir.Value) -> None:
    """Add one to the counts of the bins in so many words of 64 bits: the upper 16 of each so many bits.

    Those that follow each other go to other tables. A load of a word and shifts take less than a load of each bin.
    """
    turn = 0
    for k in range(words):
        word = b.load(at(b, source, INT64, INT64(8 * k)), align=2)
        for end in range(bits, 65, bits):
            bin_ = b.and_(b.lshr(word, INT64(end - 16)), INT64(0xFFFF))
            table = b.add(tables, b.mul(stride, INT64(turn % TABLES)))
            count = at(b, table, INT32, b.shl(bin_, INT64(2)))
            b.store(b.add(b.load(count, align=4), INT32(1)), count, align=4)
            turn += 1


def counting(bits: int) -> Any:
    """What counts the bins in words that follow each other, with one of as many bits."""

    @intrinsic
    def go(typing, source, words, tables, stride):
        def code(context, b, signature, values):
            source, words, tables, stride = values

            def step(k, held):
                count_upper(b, b.add(source, b.shl(k, INT64(5))), 4, bits, tables, stride)
                return []

            repeat(b, b.sdiv(words, INT64(4)), [], step)
            return context.get_dummy_value()

        return types.void(source, words, tables, stride), code

    return go


def can_squeeze(context: Any) -> bool:
    return "+avx512f" in context.codegen().magic_tuple()[2] and llvm_version_info[0] >= 19


def squeeze_step(b: Any, bits: ir.Value, target: ir.Value, found: ir.Value) -> ir.Value:
    """Write the bins but 0 of elements behind so many at a target, as int16; how many there are with them."""
    kind = ir.FunctionType(vector(INT32), [vector(INT32), vector(BIT), vector(INT32)])
    compress = cgutils.get_or_insert_function(b.module, kind, f"llvm.experimental.vector.compress.v{WIDE}i32")
    bins = b.lshr(bits, every(16))
    some = b.icmp_unsigned("!=", bins, every(0))
    packed = b.trunc(b.call(compress, [bins, some, every(0)]), vector(INT16))
    b.store(packed, at(b, target, vector(INT16), b.shl(found, INT64(1))), align=2)
    return b.add(found, b.zext(b.ctpop(b.bitcast(some, ir.IntType(WIDE))), INT64))


@intrinsic
def squeezing(typing, source, vectors, target):
    """Write the bins but 0 of vectors of elements, as uint16; how many, or -1 where that is slow."""

    def code(context, b, signature, values):
        if not can_squeeze(context):
            return INT64(-1)
        source, vectors, target = values

        def step(k, held):
            bits = b.load(at(b, source, vector(INT32), b.mul(k, INT64(4 * WIDE))), align=4)
            return [squeeze_step(b, bits, target, held[0])]

        return repeat(b, vectors, [INT64(0)], step)[0]

    return types.int64(source, vectors, target), code


@intrinsic
def looking_over(typing, source, rows, stride, places, sums, anchor, tables, table_stride):
    """As `span_rows`, and as `sum_rows` with one number, of the same rows, of which all elements are counted.

    In one pass, as each of the three leaves much of the processor idle."""

    def code(context, b, signature, values):
        source, rows, stride, places, sums, anchor, tables, table_stride = values
        anchors, into = [splat(b, anchor)], at(b, sums, vector(INT64))

        def work(ends):
            def step(k, held):
                place = b.add(source, b.mul(k, stride))
                bits = b.load(at(b, place, vector(INT32)), align=4)
                made = [*span_step(b, bits, held[:-1], []), *sum_step(b, bits, held[-1:], anchors)]
                count_upper(b, place, WIDE // 2, 32, tables, table_stride)
                return made

            *ends, total = repeat(b, rows, [*ends, b.load(into, align=8)], step)
            b.store(total, into, align=8)
            return ends

        in_memory(b, INT32, places, work)
        return context.get_dummy_value()

    return types.void(source, rows, stride, places, sums, anchor, tables, table_stride), code


@intrinsic
def span_squeezing(typing, source, vectors, places, target, bins, waiting, tables, stride):
    """As `span_rows` of vectors that follow each other, and as `squeeze`; AT_ONCE of the bins that wait are counted with
    each vector, as long as there are so many. How many were written, or -1, and how many counted."""

    def code(context, b, signature, values):
        if not can_squeeze(context):
            return context.make_tuple(b, PAIR, [INT64(-1), INT64(0)])
        source, vectors, places, target, bins, waiting, tables, stride = values
        numbers: list[ir.Value] = []

        def step(k, held):
            found, counted, *ends = held
            bits = b.load(at(b, source, vector(INT32), b.mul(k, INT64(4 * WIDE))), align=4)
            made = [squeeze_step(b, bits, target, found), *span_step(b, bits, ends, [])]
            further = b.add(counted, INT64(AT_ONCE))
            are_there = b.icmp_signed("<=", further, waiting)
            with b.if_then(are_there, likely=True):
                count_upper(b, b.add(bins, b.shl(counted, INT64(1))), AT_ONCE // 4, 16, tables, stride)
            return [made[0], b.select(are_there, further, counted), *made[1:]]

        def work(first):
            found, counted, *ends = repeat(b, vectors, [INT64(0), INT64(0), *first], step)
            numbers.extend((found, counted))
            return ends

        in_memory(b, INT32, places, work)
        return context.make_tuple(b, PAIR, numbers)

    return PAIR(source, vectors, places, target, bins, waiting, tables, stride), code


@intrinsic
def ending(typing, least, most, near):
    """The least of one vector in memory, the largest of another, and the least of a third, which has no signs."""

    def code(context, b, signature, values):
        found = []
        for place, how in zip(values, ("smin", "smax", "umin"), strict=True):
            kind = ir.FunctionType(INT32, [vector(INT32)])
            reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.{how}.v{WIDE}i32")
            found.append(b.call(reduce, [b.load(at(b, place, vector(INT32)), align=4)]))
        return context.make_tuple(b, signature.return_type, found)

    return types.Tuple((types.int32, types.int32, types.uint32))(least, most, near), code


span_rows, sum_rows = over_rows(INT32, span_step), over_rows(INT64, sum_step)
span_some, sum_some = over_rows(INT32, span_step, partly=True), over_rows(INT64, sum_step, partly=True)
squeeze: Any = squeezing  # the first argument of which is numba's, as of the others
look_over: Any = looking_over
ends_of_vectors: Any = ending
span_squeeze: Any = span_squeezing
count_elements, count_halves = counting(32), counting(16)  # words of two elements, and of four bins

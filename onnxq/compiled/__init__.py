"""Loops that numba compiles, by what they are for; kernels.py tells what each does, and native.py how it is called.

What a loop takes: an array of a type and so many axes, contiguous, of which its C function gets the address that the object
is at; or a number. `RECORD` is that of records.py.
"""

EXTENT = ("int32[1]", "int32[1]", "int64[2]")
COUNTS = ("uint32[2]", "int64[1]", "int16[1]", "int64[2]", "int64", "int64")
LOOPS: dict[str, dict[str, tuple[str, ...]]] = {  # by module, then by name
    "counting": {
        "carry": ("int64[2]",),
        "drain": COUNTS,
        "drain_at": ("int64",) * 8,
        "observe": ("float32[3]", "int64", "int64", *EXTENT, *COUNTS),
        "observe_at": ("int64",) * 18,
        "ends": ("int32[1]", "int32[1]", "float64[1]"),
        "widen": ("int32[1]", "int32[1]", "float32[1]", "float32[1]"),
    },
    "op": {
        "count_input": ("int64", "int64"),
        "ends_of": ("RECORD[1]", "float64[2]"),
        "widen_by": ("RECORD[1]",),
    },
    "quantizing": {
        "excess": ("int32[2]", "int32[2]", "int64[1]", "int64[1]", "int64[2]"),
        "squared_error": (*["float64[1]"] * 5, "float64", "float64[1]"),
        "energies": ("float32[2]", "float64[2]"),
        "rounding_errors": ("float32[2]", "float32[1]", "float32[1]", "float32[1]", "float64[1]"),
        "round_block": ("int32[3]", *["float32[3]"] * 3, "float32[2]", "int32[2]", "int32[2]", "int64"),
    },
}
GIVING = ("drain", "drain_at", "observe", "observe_at", "ends_of", "round_block")  # a whole number; the others give nothing
TABLES = 4  # in which elements are counted by turns
MOST_AT_ONCE = 1 << 30  # elements, so that their counts fit 32 bits in a table
NO_MEMORY = -2  # what `observe` gives in place of the number of pages that are used
PREFIX = "onnxq_"  # of the names of the C functions
SHORT = ("ends", "widen", "ends_of", "widen_by")  # during which other threads of Python wait: to give way would take longer

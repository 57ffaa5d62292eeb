"""Random valid models for fuzzing: what exporters produce, put together without sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[Any, ...]
MOST_ELEMENTS = 4096


class Maker:
    """A graph that grows by one op at a time; every float tensor that it made is there to be read again."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, Shape] = {}
        self.rng = np.random.default_rng(seed)
        self.serial = 0

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, of: int = 2) -> bool:
        """True once in so many times."""
        return int(self.rng.integers(of)) == 0

    def fresh(self, base: str) -> str:
        self.serial += 1
        return f"{base}_{self.serial}"

    def weight(self, *shape: int, low: float = -1.0, high: float = 1.0) -> str:
        """A new weight, or one of this shape that is used elsewhere already."""
        same = [t.name for t in self.weights if tuple(t.dims) == shape and t.data_type == TensorProto.FLOAT]
        if same and low < 0 and self.chance():
            return self.pick(*same)
        values = self.rng.uniform(low, high, shape).astype(np.float32)
        if self.chance(20):
            values[...] = 0
        return self.constant(values)

    def constant(self, values: Any) -> str:
        name = self.fresh("w")
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        name = self.fresh("t")
        self.nodes.append(helper.make_node(kind, inputs, [name], name=self.fresh(kind), **attributes))
        self.shapes[name] = shape
        return name

    def any_of(self, *ranks: int) -> str | None:
        found = [n for n, s in self.shapes.items() if not ranks or len(s) in ranks]
        return self.pick(*found[-6:]) if found else None

    def step(self) -> None:
        """One more op on something that is there; nothing where what was drawn does not fit."""
        kinds = [
            self.conv,
            self.transposed,
            self.dense,
            self.gemm,
            self.unary,
            self.binary,
            self.vector,
            self.pool,
            self.norm,
        ]
        kinds += [self.concat, self.split, self.move, self.pad, self.reduce, self.branch, self.gate]
        self.pick(*kinds)()

    def conv(self) -> None:
        x = self.any_of(3, 4)
        if x is None:
            return
        n, c, *size = self.shapes[x]
        group = self.pick(1, 1, c) if c <= 8 else 1
        d = group * self.pick(1, 2, 3, 4)
        kernel = [self.pick(1, 2, 3) for _ in size]
        pads, strides, dilations = (
            [self.pick(0, 1) for _ in size],
            [self.pick(1, 2) for _ in size],
            [self.pick(1, 1, 2) for _ in size],
        )
        out = [
            (s + 2 * p - r * (k - 1) - 1) // t + 1
            for s, p, r, k, t in zip(size, pads, dilations, kernel, strides, strict=True)
        ]
        if min(out) < 1:
            return
        inputs = [x, self.weight(d, c // group, *kernel)] + ([self.weight(d)] if self.chance() else [])
        self.op(
            "Conv",
            inputs,
            (n, d, *out),
            group=group,
            kernel_shape=kernel,
            pads=pads * 2,
            strides=strides,
            dilations=dilations,
        )

    def transposed(self) -> None:
        x = self.any_of(4)
        if x is None:
            return
        n, c, h, w = self.shapes[x]
        if h * w * 4 > MOST_ELEMENTS // 8:
            return
        self.op("ConvTranspose", [x, self.weight(c, 3, 2, 2), self.weight(3)], (n, 3, 2 * h, 2 * w), strides=[2, 2])

    def dense(self) -> None:
        x = self.any_of(2, 3, 4)
        if x is None:
            return
        *rest, k = self.shapes[x]
        m = self.pick(1, 3, 8)
        y = self.op("MatMul", [x, self.weight(k, m)], (*rest, m))
        if self.chance():
            self.op("Add", [y, self.weight(m)], (*rest, m))

    def gemm(self) -> None:
        x = self.any_of(2)
        if x is None:
            return
        n, k = self.shapes[x]
        m, flip = self.pick(2, 5), self.pick(0, 1)
        w = self.weight(m, k) if flip else self.weight(k, m)
        self.op("Gemm", [x, w, self.weight(m)], (n, m), transB=flip, alpha=self.pick(1.0, 0.5), beta=self.pick(1.0, 2.0))

    def unary(self) -> None:
        x = self.any_of()
        if x is None:
            return
        kind = self.pick(
            "Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "HardSigmoid", "Identity", "Neg", "Clip", "Softmax", "Erf"
        )
        shape = self.shapes[x]
        if kind == "Clip":
            low, high = self.pick((0.0, 6.0), (-1.0, 1.0), (0.0, 1.0))
            self.op("Clip", [x, self.constant(np.float32(low)), self.constant(np.float32(high))], shape)
        elif kind == "Softmax":
            self.op("Softmax", [x], shape, axis=self.pick(1, -1) if len(shape) > 1 else -1)
        else:
            self.op(kind, [x], shape)

    def binary(self) -> None:
        x = self.any_of()
        if x is None:
            return
        same = [n for n, s in self.shapes.items() if s == self.shapes[x]]
        self.op(self.pick("Add", "Mul", "Sub", "Max"), [x, self.pick(*same)], self.shapes[x])

    def vector(self) -> None:
        x = self.any_of()
        if x is None:
            return
        shape = self.shapes[x]
        if len(shape) == 4 and self.chance():
            other = self.weight(shape[1], 1, 1, low=0.5, high=1.5)
        else:
            other = self.weight(shape[-1], low=0.5, high=1.5)
        self.op(self.pick("Add", "Mul", "Sub", "Div"), [x, other], shape)

    def pool(self) -> None:
        x = self.any_of(4)
        if x is None or min(self.shapes[x][2:]) < 2:
            return
        n, c, h, w = self.shapes[x]
        if self.chance():
            self.op(self.pick("GlobalAveragePool", "GlobalMaxPool"), [x], (n, c, 1, 1))
        else:
            self.op(self.pick("MaxPool", "AveragePool"), [x], (n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])

    def norm(self) -> None:
        x = self.any_of(2, 3, 4)
        if x is None:
            return
        shape = self.shapes[x]
        if self.chance():
            c = shape[1]
            parameters = [
                self.weight(c, low=0.5, high=1.5),
                self.weight(c),
                self.weight(c),
                self.weight(c, low=0.5, high=1.5),
            ]
            self.op("BatchNormalization", [x, *parameters], shape)
        elif shape[-1] > 1:
            self.op("LayerNormalization", [x, self.weight(shape[-1], low=0.5, high=1.5), self.weight(shape[-1])], shape)

    def concat(self) -> None:
        x = self.any_of(2, 3, 4)
        if x is None:
            return
        shape = self.shapes[x]
        fitting = [n for n, s in self.shapes.items() if len(s) == len(shape) and (s[0], *s[2:]) == (shape[0], *shape[2:])]
        other = self.pick(*fitting)
        self.op("Concat", [x, other], (shape[0], shape[1] + self.shapes[other][1], *shape[2:]), axis=1)

    def split(self) -> None:
        x = self.any_of(2, 3, 4)
        if x is None or self.shapes[x][1] < 2:
            return
        n, c, *rest = self.shapes[x]
        names = [self.fresh("t"), self.fresh("t")]
        sizes = self.constant(np.array([1, c - 1], np.int64))
        self.nodes.append(helper.make_node("Split", [x, sizes], names, name=self.fresh("Split"), axis=1))
        self.shapes |= {names[0]: (n, 1, *rest), names[1]: (n, c - 1, *rest)}

    def move(self) -> None:
        x = self.any_of(2, 3, 4)
        if x is None:
            return
        shape = self.shapes[x]
        kind = self.pick("Transpose", "Flatten", "Reshape", "Slice", "Unsqueeze")
        if kind == "Transpose":
            perm = [0, *(1 + int(k) for k in self.rng.permutation(len(shape) - 1))]
            self.op("Transpose", [x], tuple(shape[k] for k in perm), perm=perm)
        elif kind == "Flatten":
            self.op("Flatten", [x], (shape[0], int(np.prod(shape[1:]))))
        elif kind == "Reshape":
            target = self.constant(np.array([shape[0], -1, shape[-1]], np.int64))
            self.op("Reshape", [x, target], (shape[0], int(np.prod(shape[1:-1])), shape[-1]))
        elif kind == "Slice" and shape[-1] > 1:
            bounds = [self.constant(np.array([v], np.int64)) for v in (0, shape[-1] - 1, -1)]
            self.op("Slice", [x, *bounds], (*shape[:-1], shape[-1] - 1))
        elif kind == "Unsqueeze" and len(shape) < 4:
            n, *rest = list(shape)
            self.op("Unsqueeze", [x, self.constant(np.array([1], np.int64))], (n, 1, *rest))

    def pad(self) -> None:
        x = self.any_of(4)
        if x is None:
            return
        n, c, h, w = self.shapes[x]
        self.op("Pad", [x, self.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64))], (n, c, h + 1, w + 1))

    def reduce(self) -> None:
        x = self.any_of(3, 4)
        if x is None:
            return
        shape = self.shapes[x]
        self.op("ReduceMean", [x], (*shape[:-1], 1), axes=[-1], keepdims=1)

    def branch(self) -> None:
        x = self.any_of(2)
        if x is None:
            return
        n, k = self.shapes[x]
        bodies = []
        for kind in ("then", "else"):
            y, w = (
                self.fresh("b"),
                numpy_helper.from_array(self.rng.uniform(-1, 1, (k, 3)).astype(np.float32), self.fresh("bw")),
            )
            node = helper.make_node("MatMul", [x, w.name], [y], name=self.fresh("MatMul"))
            out = helper.make_tensor_value_info(y, TensorProto.FLOAT, [n, 3])
            bodies.append(helper.make_graph([node], kind, [], [out], [w]))
        flag = self.constant(np.array(self.chance()))
        if self.chance():  # a condition that only a run tells
            total = self.op("ReduceSum", [x], (), keepdims=0)
            del self.shapes[total]
            flag = self.fresh("f")
            self.nodes.append(
                helper.make_node("Greater", [total, self.constant(np.float32(0))], [flag], name=self.fresh("Greater"))
            )
        self.op("If", [flag], (n, 3), then_branch=bodies[0], else_branch=bodies[1])

    def gate(self) -> None:
        x = self.any_of()
        if x is None:
            return
        shape = self.shapes[x]
        self.op("Mul", [x, self.op("Sigmoid", [x], shape)], shape)


def random_model(seed: int, steps: int) -> onnx.ModelProto:
    """A model of so many steps on one input (batch 2) of rank 2, 3 or 4; two of the tensors that it makes are outputs."""
    maker = Maker(seed)
    shape = maker.pick((2, 6), (2, 5, 8), (2, 3, 8, 8), (2, 8, 6, 6))
    maker.shapes["x"] = shape
    for _ in range(steps):
        maker.step()
        maker.shapes = {n: s for n, s in maker.shapes.items() if np.prod(s, dtype=int) <= MOST_ELEMENTS}
    made = [n for n in maker.shapes if n != "x"] or [maker.op("Relu", ["x"], shape)]
    outputs = list(dict.fromkeys([made[-1], maker.pick(*made)]))
    graph = helper.make_graph(
        maker.nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(maker.shapes[n])) for n in outputs],
        maker.weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

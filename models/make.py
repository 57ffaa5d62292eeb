"""Train the example models on handwritten digits and export them to ONNX as their exporters leave them.

Usage: python models/make.py [MODEL]

Writes the named model (all by default), the calibration and evaluation sets and models.toml into the folder of
this script. Runs on one CPU thread from a fixed seed. See README.md for the versions that made the files here.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import digits
import networks
import numpy as np
import onnx
import onnxruntime  # noqa: TID251 -- this script stands alone
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
BATCH_SIZE = 64
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Example:
    """How one model is made."""

    architecture: Callable[[], nn.Module]
    epochs: int
    data: str = "digits"  # or moving
    optimizer: str = "sgd"  # or adamw
    clean: float = 0.0  # share of training images that are not augmented
    dynamo: bool = False  # which of PyTorch's two exporters writes it
    opset: int = 17

    @property
    def input(self) -> str:
        return "image" if self.data == "digits" else "clip"


EXAMPLES = {
    "residual": Example(networks.residual, 60),
    "inverted_residual": Example(networks.inverted_residual, 150),
    "vision_transformer": Example(networks.vision_transformer, 120, optimizer="adamw", clean=0.25, dynamo=True, opset=18),
    "recurrent": Example(networks.recurrent, 100, optimizer="adamw"),
    "video": Example(networks.video, 40, data="moving"),
}


def train(model: nn.Module, example: Example, pixels: Tensor, labels: Tensor) -> None:
    """Minimise cross-entropy with a one-cycle learning rate, by SGD with Nesterov momentum or by AdamW."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    offsets_and_scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": offsets_and_scales, "weight_decay": 0.0}]
    if example.optimizer == "sgd":
        peak = 0.1
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    else:
        peak = 2e-3
        optimizer = torch.optim.AdamW(groups, lr=peak)
    steps = len(pixels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=example.epochs * steps)
    model.train()
    for epoch in range(example.epochs):
        loss_sum = 0.0
        if example.data == "moving":  # new clips of the same digits
            clips, ways = digits.moving(pixels.numpy(), labels.numpy(), np.random.default_rng(epoch))
            batches, targets = torch.from_numpy(clips), torch.from_numpy(ways)
        else:
            batches, targets = pixels, labels
        for batch in torch.randperm(len(pixels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            inputs = batches[batch]
            if example.data == "digits":
                distorted = digits.augment(inputs)
                kept = int(example.clean * len(inputs))
                inputs = torch.cat([inputs[:kept], distorted[kept:]])
            loss = F.cross_entropy(model(digits.normalise(inputs)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        print(f"epoch {epoch + 1}/{example.epochs}: loss {loss_sum / steps:.4f}", flush=True)
    model.eval()


def export(model: nn.Module, example: Example, path: Path) -> None:
    """Write the model, in inference mode, with its BatchNormalization nodes left as they are."""
    shape = (1, 1, 32, 32) if example.data == "digits" else (1, 1, digits.FRAMES, 32, 32)
    if example.dynamo:
        torch.onnx.export(
            model, (torch.zeros(2, *shape[1:]),), path, dynamo=True, opset_version=example.opset, external_data=False,
            input_names=[example.input], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("N")},),
        )  # fmt: skip
    else:
        torch.onnx.export(
            model, (torch.zeros(shape),), path, dynamo=False, opset_version=example.opset,
            training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold BatchNormalization into the convolutions
            do_constant_folding=False,
            input_names=[example.input], output_names=["logits"],
            dynamic_axes={example.input: {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip
    strip_notes(path)
    onnx.checker.check_model(path, full_check=True)


def strip_notes(path: Path) -> None:
    """Take out what the exporter notes on its nodes: where in the source, on which machine's paths, each was called."""
    proto = onnx.load(path)
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    onnx.save(proto, path)


def measure_top1(path: Path, data: Path) -> float:
    """The share of samples whose largest logit is that of their label, as ONNX Runtime computes it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays = dict(np.load(data))
    labels = arrays.pop("label")
    (logits,) = session.run(["logits"], arrays)
    return float(np.mean(logits.argmax(axis=1) == labels))


def write_index() -> None:
    """Write models.toml: for each model in the folder its file, its data sets and its float accuracy."""
    tables = []
    for name, example in EXAMPLES.items():
        path = FOLDER / f"{name}.onnx"
        if path.exists():
            top1 = measure_top1(path, FOLDER / f"{example.data}_evaluation.npz")
            print(f"{name}: float top-1 {top1:.4f}")
            tables.append(
                f'[{name}]\nfile = "{path.name}"\ncalibration = "{example.data}_calibration.npz"\n'
                f'evaluation = "{example.data}_evaluation.npz"\nmetric = "top1"\nfloat_top1 = {top1:.4f}\n'
            )
    (FOLDER / "models.toml").write_text("\n".join(tables), encoding="utf-8")


def main() -> None:
    """Write the data sets, train and export the chosen models, and measure them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=list(EXAMPLES), help="the model to make (default: all)")
    chosen = parser.parse_args().model

    (pixels, labels), *others = digits.split(*digits.still())
    for use, (images, numbers) in zip(("calibration", "evaluation"), others, strict=True):
        np.savez_compressed(FOLDER / f"digits_{use}.npz", image=digits.normalise(images), label=numbers)
        clips, ways = digits.moving(images, numbers, np.random.default_rng(len(images)))
        np.savez_compressed(FOLDER / f"moving_{use}.npz", clip=digits.normalise(clips), label=ways)

    torch.set_num_threads(1)
    for name in [chosen] if chosen else EXAMPLES:
        example = EXAMPLES[name]
        torch.manual_seed(digits.SEED)
        model = example.architecture()
        started = time.perf_counter()
        train(model, example, torch.from_numpy(pixels), torch.from_numpy(labels))
        print(f"{name}: trained in {time.perf_counter() - started:.0f} s")
        export(model, example, FOLDER / f"{name}.onnx")
    write_index()


if __name__ == "__main__":
    main()

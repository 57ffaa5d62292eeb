"""Train the two example models on handwritten digits and export them to ONNX with BatchNormalization kept.

Usage: python models/make.py [residual|inverted_residual]

Writes the named model (both by default), the calibration and evaluation sets and models.toml into the folder of
this script. Runs on one CPU thread from a fixed seed. See README.md for the versions that made the files here.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # noqa: TID251 -- this script stands alone
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
CALIBRATION = "digits_calibration.npz"
EVALUATION = "digits_evaluation.npz"

SEED = 2024
CLASSES = 10
ENLARGEMENT = 4  # 8x8 digits become 32x32 images
PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of the digits scaled to [0, 1]
EVALUATION_SIZE = 500
CALIBRATION_SIZE = 128

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
OPSET = 17


class ConvNorm(nn.Module):
    """A "same"-padded convolution without bias, then batch normalization, then an optional activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """The basic block of ResNet: two 3x3 convolutions, with a 1x1 projection shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, out_channels, 3, stride, activation=nn.ReLU)
        self.second = ConvNorm(out_channels, out_channels, 3)
        same_shape = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same_shape else ConvNorm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from the global average of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        average = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(average))))


class InvertedResidual(nn.Module):
    """The block of MobileNet: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel: int,
        stride: int,
        activation: type[nn.Module],
        squeezed: int = 0,
    ) -> None:
        super().__init__()
        self.expand = ConvNorm(in_channels, expanded, 1, activation=activation)
        self.depthwise = ConvNorm(expanded, expanded, kernel, stride, groups=expanded, activation=activation)
        self.gate = SqueezeExcite(expanded, squeezed) if squeezed else nn.Identity()
        self.project = ConvNorm(expanded, out_channels, 1)
        self.same_shape = in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + projected if self.same_shape else projected


class Classifier(nn.Module):
    """A feature extractor followed by global average pooling and a linear head."""

    def __init__(self, channels: int, **features: nn.Module) -> None:
        super().__init__()
        self.features = list(features)
        for name, module in features.items():
            self.add_module(name, module)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.features:
            x = self.get_submodule(name)(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def residual() -> nn.Module:
    """A small ResNet with ReLU; the blocks run at 16x16, 16x16 and 8x8."""
    return Classifier(
        128,
        stem=ConvNorm(1, 64, 3, activation=nn.ReLU),
        pool=nn.MaxPool2d(2),
        block1=ResidualBlock(64, 64),
        block2=ResidualBlock(64, 64),
        block3=ResidualBlock(64, 128, stride=2),
    )


def inverted_residual() -> nn.Module:
    """A small MobileNet with HardSwish in the early blocks and SiLU in the late ones."""
    return Classifier(
        160,
        stem=ConvNorm(1, 16, 3, stride=2, activation=nn.Hardswish),
        block1=InvertedResidual(16, 64, 16, kernel=3, stride=1, activation=nn.Hardswish),
        block2=InvertedResidual(16, 96, 32, kernel=3, stride=2, activation=nn.Hardswish),
        block3=InvertedResidual(32, 128, 32, kernel=3, stride=1, activation=nn.Hardswish),
        block4=InvertedResidual(32, 144, 48, kernel=3, stride=2, activation=nn.SiLU),
        block5=InvertedResidual(48, 192, 48, kernel=5, stride=1, activation=nn.SiLU, squeezed=48),
        block6=InvertedResidual(48, 192, 48, kernel=3, stride=1, activation=nn.SiLU),
        last=ConvNorm(48, 160, 1, activation=nn.SiLU),
    )


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # name: (constructor, training epochs)
    "residual": (residual, 60),
    "inverted_residual": (inverted_residual, 150),
}


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The digits as float32 pixels in [0, 1], shaped (N, 1, 32, 32), and their int64 labels."""
    digits = load_digits()
    images = np.kron(digits.images, np.ones((1, ENLARGEMENT, ENLARGEMENT))) / 16
    return images[:, np.newaxis].astype(np.float32), digits.target.astype(np.int64)


def normalise(pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Map pixels in [0, 1] to what the models take as input."""
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def augment(pixels: Tensor) -> Tensor:
    """Distort each image by a small random affine map and add noise."""
    count = len(pixels)

    def uniform(limit: float) -> Tensor:
        return torch.empty(count).uniform_(-limit, limit)

    angle, shear = uniform(0.2), uniform(0.15)
    width, height = 1 + uniform(0.1), 1 + uniform(0.1)
    shift_x, shift_y = uniform(0.2), uniform(0.2)  # 1 is half the image: up to 3.2 of 32 pixels
    rows = [
        torch.stack([width * angle.cos(), shear - angle.sin(), shift_x], dim=1),
        torch.stack([angle.sin(), height * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    distorted = F.grid_sample(pixels, grid, align_corners=False)
    return distorted + 0.05 * torch.randn_like(distorted)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int) -> None:
    """Minimise cross-entropy by SGD with Nesterov momentum and a one-cycle learning rate."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    offsets_and_scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": offsets_and_scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True)
    steps = len(pixels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        loss_sum = 0.0
        for batch in torch.randperm(len(pixels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(normalise(augment(pixels[batch]))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss_sum / steps:.4f}", flush=True)
    model.eval()


def export(model: nn.Module, path: Path) -> None:
    """Write the model, in inference mode, with its BatchNormalization nodes left as they are."""
    side = 8 * ENLARGEMENT
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, side, side),),
        path,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold BatchNormalization into the convolutions
        do_constant_folding=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
    )
    onnx.checker.check_model(path, full_check=True)


def measure_top1(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is that of their label, as ONNX Runtime computes it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    return float(np.mean(logits.argmax(axis=1) == labels))


def write_index(images: np.ndarray, labels: np.ndarray) -> None:
    """Write models.toml: for each model in the folder its file, its data sets and its float accuracy."""
    tables = []
    for name in ARCHITECTURES:
        path = FOLDER / f"{name}.onnx"
        if path.exists():
            top1 = measure_top1(path, images, labels)
            print(f"{name}: float top-1 {top1:.4f}")
            tables.append(
                f'[{name}]\nfile = "{path.name}"\ncalibration = "{CALIBRATION}"\nevaluation = "{EVALUATION}"\n'
                f'metric = "top1"\nfloat_top1 = {top1:.4f}\n'
            )
    (FOLDER / "models.toml").write_text("\n".join(tables), encoding="utf-8")


def main() -> None:
    """Write the data sets, train and export the chosen models, and measure them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=list(ARCHITECTURES), help="the model to make (default: all)")
    chosen = parser.parse_args().model

    pixels, labels = digit_images()
    pixels, held_out_pixels, labels, held_out_labels = train_test_split(
        pixels, labels, test_size=EVALUATION_SIZE, stratify=labels, random_state=SEED
    )
    _, calibration_pixels, _, calibration_labels = train_test_split(
        pixels, labels, test_size=CALIBRATION_SIZE, stratify=labels, random_state=SEED
    )
    held_out_images = normalise(held_out_pixels)
    np.savez_compressed(FOLDER / CALIBRATION, image=normalise(calibration_pixels), label=calibration_labels)
    np.savez_compressed(FOLDER / EVALUATION, image=held_out_images, label=held_out_labels)

    torch.set_num_threads(1)
    for name in [chosen] if chosen else ARCHITECTURES:
        architecture, epochs = ARCHITECTURES[name]
        torch.manual_seed(SEED)
        model = architecture()
        started = time.perf_counter()
        train(model, torch.from_numpy(pixels), torch.from_numpy(labels), epochs)
        print(f"{name}: trained in {time.perf_counter() - started:.0f} s")
        export(model, FOLDER / f"{name}.onnx")
    write_index(held_out_images, held_out_labels)


if __name__ == "__main__":
    main()

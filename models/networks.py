"""The architectures of the example models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
DIRECTIONS = 4


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


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.query_key_value(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron with GELU, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(F.gelu(self.expand(self.perceptron_norm(x))))


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels as tokens; the mean of the last tokens goes to a linear head."""

    def __init__(self, side: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // 4) ** 2, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class RowReader(nn.Module):
    """An LSTM that reads an image row by row; its last state goes to a linear head."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(side, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        states, _ = self.lstm(F.relu(self.embed(image.squeeze(1))))
        return self.head(states[:, -1])


class VideoReader(nn.Module):
    """A 3-D convolution over the clip, a ResNet over each frame, a GRU over the frames, a linear head.

    The head tells the digit and which way it moves: class = digit + 10 * direction.
    """

    def __init__(self, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv3d(1, widths[0], (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False),
            nn.BatchNorm3d(widths[0]),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        )
        blocks = []
        for before, after in zip((widths[0], *widths), widths, strict=False):
            blocks += [ResidualBlock(before, after, stride=1 if before == after else 2), ResidualBlock(after, after)]
        self.trunk = nn.Sequential(*blocks)
        self.gru = nn.GRU(widths[-1], hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES * DIRECTIONS)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.front(clip)
        batch, channels, frames, height, width = x.shape
        x = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        x = F.adaptive_avg_pool2d(self.trunk(x), 1).reshape(batch, frames, -1)
        states, _ = self.gru(x)
        return self.head(states[:, -1])


def vision_transformer() -> nn.Module:
    """A small pre-norm vision transformer: 64 tokens."""
    return VisionTransformer(side=32, width=96, heads=4, depth=4)


def recurrent() -> nn.Module:
    """A small LSTM over the 32 rows of an image."""
    return RowReader(side=32, width=128)


def video() -> nn.Module:
    """A small network of the kind used to read lips: 3-D front, ResNet-18 trunk, GRU."""
    return VideoReader(widths=(32, 48, 64, 96), hidden=128)

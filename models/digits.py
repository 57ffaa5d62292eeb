"""The data of the example models: the handwritten digits of scikit-learn, still and moving."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SEED = 2024
ENLARGEMENT = 4  # 8x8 digits become 32x32 images
MOVING_ENLARGEMENT = 2  # and 16x16 digits that move over 32x32 frames
FRAMES = 8
PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of the digits scaled to [0, 1]
EVALUATION_SIZE = 500
CALIBRATION_SIZE = 128
STEPS = np.array([(0, 2), (0, -2), (2, 0), (-2, 0)])  # rows and columns a frame, by direction: right, left, down, up

Arrays = tuple[np.ndarray, np.ndarray]  # pixels in [0, 1], int64 labels


def still() -> Arrays:
    """The digits as float32 pixels in [0, 1], shaped (N, 1, 32, 32), and their int64 labels."""
    digits = load_digits()
    images = np.kron(digits.images, np.ones((1, ENLARGEMENT, ENLARGEMENT))) / 16
    return images[:, np.newaxis].astype(np.float32), digits.target.astype(np.int64)


def moving(images: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> Arrays:
    """A clip of (1, FRAMES, 32, 32) pixels for each still image: its digit moves one way from a random place.

    The label is digit + 10 * direction.
    """
    step = ENLARGEMENT // MOVING_ENLARGEMENT
    small = images[:, 0, ::step, ::step]
    side, count = small.shape[-1], len(small)
    directions = generator.integers(len(STEPS), size=count)
    travel = 2 * (FRAMES - 1)
    start = generator.integers(0, 32 - side + 1, size=(count, 2))
    along = generator.integers(0, 32 - side - travel + 1, size=count)
    clips = np.zeros((count, 1, FRAMES, 32, 32), np.float32)
    for clip, image, way, place, offset in zip(clips, small, directions, start, along, strict=True):
        move = STEPS[way]
        axis = int(np.flatnonzero(move)[0])
        place[axis] = offset if move[axis] > 0 else offset + travel
        for frame in range(FRAMES):
            row, column = place + frame * move
            clip[0, frame, row : row + side, column : column + side] = image
    return clips, labels + 10 * directions


def split(pixels: np.ndarray, labels: np.ndarray) -> tuple[Arrays, Arrays, Arrays]:
    """Training, calibration and evaluation sets; the calibration set is a part of the training set."""
    pixels, held_out, labels, held_out_labels = train_test_split(
        pixels, labels, test_size=EVALUATION_SIZE, stratify=labels, random_state=SEED
    )
    _, calibration, _, calibration_labels = train_test_split(
        pixels, labels, test_size=CALIBRATION_SIZE, stratify=labels, random_state=SEED
    )
    return (pixels, labels), (calibration, calibration_labels), (held_out, held_out_labels)


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

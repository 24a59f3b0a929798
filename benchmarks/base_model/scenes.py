"""Pictures of up to four objects in the corners of a square, rendered all at once and kept as tensors.

A scene holds one object, two to four copies of one object, or two or three different objects.  An object is a real
handwritten digit (scikit-learn's 1,797) or a drawn shape, in one of eight colours.  Each corner is one image token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import affine_grid, grid_sample, interpolate

CELL, GRID = 16, 2  # pixels on a side of a corner; corners on a side of the picture
IMAGE_SIZE = CELL * GRID
SPRITE = 24  # pixels on a side of an object before it is turned, scaled and placed

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("triangle", "square", "circle", "cross", "star", "diamond")
COLORS = {
    "red": (235, 40, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 240, 60),
    "pink": (255, 150, 200),
    "green": (50, 200, 60),
    "cyan": (70, 230, 230),
    "blue": (60, 90, 255),
    "purple": (160, 50, 220),
}
BACKGROUNDS = {"black": (8, 8, 8), "gray": (90, 90, 90), "brown": (80, 50, 20), "navy": (15, 20, 80)}

# The values of what can be asked about a scene as a whole, by the word that asks for it.
ATTRIBUTES = {
    "object": (*DIGITS, *SHAPES),
    "color": tuple(COLORS),
    "count": ("one", "two", "three", "four"),
    "kinds": ("one", "two", "three"),
    "background": tuple(BACKGROUNDS),
    "size": ("small", "large"),
    "corner": ("northwest", "northeast", "southwest", "southeast"),
}
OBJECTS = ATTRIBUTES["object"]
EMPTY, COLORLESS = len(OBJECTS), len(COLORS)  # what a corner without an object holds
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is on them; corners in reading order."""

    pixels: torch.Tensor  # (N, 3, 32, 32), bytes
    kind: np.ndarray  # (N, 4), index into OBJECTS, or EMPTY
    color: np.ndarray  # (N, 4), index into COLORS, or COLORLESS
    size: np.ndarray  # (N,)
    background: np.ndarray  # (N,)

    def __len__(self) -> int:
        return len(self.pixels)

    def pixel_values(self, rows: np.ndarray | list[int]) -> torch.Tensor:
        """What the image processor makes of these pictures."""
        return self.pixels[torch.as_tensor(rows)].float() / 127.5 - 1

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row].permute(1, 2, 0).numpy())

    @functools.cached_property
    def attributes(self) -> dict[str, np.ndarray]:
        """The value of each attribute of each scene, -1 where the question makes no sense."""
        filled = self.kind != EMPTY
        count = filled.sum(axis=1)
        kinds = np.stack([(self.kind == kind).any(axis=1) for kind in range(EMPTY)]).sum(axis=0)
        first = filled.argmax(axis=1)
        rows = np.arange(len(self))
        return {
            "object": np.where(kinds == 1, self.kind[rows, first], -1),
            "color": np.where(kinds == 1, self.color[rows, first], -1),
            "count": count - 1,
            "kinds": kinds - 1,
            "background": self.background,
            "size": self.size,
            "corner": np.where(count == 1, first, -1),
        }

    @functools.cached_property
    def _by_value(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        sorted_rows = {name: np.argsort(values, kind="stable") for name, values in self.attributes.items()}
        return {
            name: (rows, np.searchsorted(self.attributes[name][rows], np.arange(len(ATTRIBUTES[name]) + 1)))
            for name, rows in sorted_rows.items()
        }

    def draw_with(self, attribute: str, values: np.ndarray, rng: np.random.Generator) -> list[int]:
        """For each value a random scene that has it."""
        rows, starts = self._by_value[attribute]
        places = starts[values] + rng.random(len(values)) * (starts[values + 1] - starts[values])
        return rows[places.astype(int)].tolist()


@functools.cache
def digit_rows() -> dict[str, np.ndarray]:
    """Rows of scikit-learn's digits by split: 1,222 train, 215 validation, 360 test, stratified, always the same."""
    target = load_digits().target
    rest, test = train_test_split(np.arange(len(target)), test_size=360, stratify=target, random_state=0)
    train, validation = train_test_split(rest, test_size=215, stratify=target[rest], random_state=0)
    return {"train": train, "validation": validation, "test": test}


def _shape(name: str) -> np.ndarray:
    scale = 8 * SPRITE
    picture = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(picture)
    if name == "circle":
        pen.ellipse([0.1 * scale, 0.1 * scale, 0.9 * scale, 0.9 * scale], fill=255)
    else:
        a, b = 0.35, 0.65
        rays = zip([0.55, 0.22] * 5, np.arange(10) * np.pi / 5, strict=True)
        star = [(0.5 + r * np.sin(turn), 0.53 - r * np.cos(turn)) for r, turn in rays]
        corners = {
            "triangle": [(0.5, 0.08), (0.95, 0.9), (0.05, 0.9)],
            "square": [(0.12, 0.12), (0.88, 0.12), (0.88, 0.88), (0.12, 0.88)],
            "cross": [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)],
            "star": star,
            "diamond": [(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)],
        }[name]
        pen.polygon([(x * scale, y * scale) for x, y in corners], fill=255)
    return np.asarray(picture.resize((SPRITE, SPRITE), Image.Resampling.BOX), np.float32) / 255


@functools.cache
def _sprites(split: str) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Every object of a split as opacity (M, 24, 24), and where each kind begins and how many there are of it."""
    digits = load_digits()
    rows = digit_rows()[split]
    rows = rows[np.argsort(digits.target[rows], kind="stable")]
    drawn = torch.from_numpy(digits.images[rows] / 16).float()[:, None]
    drawn = interpolate(drawn, (SPRITE, SPRITE), mode="bicubic")[:, 0].clamp(0, 1)
    shapes = torch.from_numpy(np.stack([_shape(name) for name in SHAPES]))
    counts = np.concatenate([np.bincount(digits.target[rows], minlength=10), np.ones(len(SHAPES), int)])
    return torch.cat([drawn, shapes]), np.cumsum(counts) - counts, counts


def make_scenes(split: str, number: int, seed: int = 0, chunk: int = 4096) -> Scenes:
    """Scenes of a split's digits; the same arguments give the same pictures, bit for bit."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    rows = np.arange(number)
    different = rng.choice([1, 2, 3], number, p=[0.6, 0.2, 0.2])
    count = np.where(different == 1, rng.choice([1, 2, 3, 4], number, p=[0.4, 0.2, 0.2, 0.2]), different)
    place = rng.random((number, 4)).argsort(axis=1)  # place[i, j]: the corner of the j-th object
    kinds = rng.random((number, EMPTY)).argsort(axis=1)[:, :4]
    colors = rng.integers(COLORLESS, size=(number, 4))
    kind, color = np.full((number, 4), EMPTY), np.full((number, 4), COLORLESS)
    for j in range(4):
        source = np.where(different == 1, 0, j)
        there = j < count
        kind[rows[there], place[there, j]] = kinds[rows, source][there]
        color[rows[there], place[there, j]] = colors[rows, source][there]
    size, background = rng.integers(2, size=number), rng.integers(len(BACKGROUNDS), size=number)
    pixels = torch.cat(
        [_render(split, kind[i], color[i], size[i], background[i], rng) for i in np.split(rows, rows[chunk::chunk])]
    )
    return Scenes(pixels, kind, color, size, background)


def _render(
    split: str, kind: np.ndarray, color: np.ndarray, size: np.ndarray, background: np.ndarray, rng: np.random.Generator
) -> torch.Tensor:
    sprites, starts, counts = _sprites(split)
    scene, corner = np.nonzero(kind != EMPTY)
    there = kind[scene, corner]
    chosen = sprites[torch.from_numpy(starts[there] + (rng.random(len(there)) * counts[there]).astype(int))]

    # The transform maps places of the corner to places of the sprite, so a small object has a large factor.
    # Training's 1,222 digits are bent, turned and sheared far more than those they stand in for.
    jitter = 1.0 if split == "train" else 0.3
    factor = np.where(size[scene] == 1, 1.1, 1.5)
    angle, x, y, *change = jitter * rng.uniform(-1, 1, (7, len(there)))
    cos, sin = factor * np.cos(0.25 * angle), factor * np.sin(0.25 * angle)
    a, b, c, d = (0.12 * part * factor for part in change)  # stretch and shear
    maps = np.stack([cos + a, b - sin, 0.12 * factor * x, sin + c, cos + d, 0.12 * factor * y], axis=1)
    theta = torch.from_numpy(maps.reshape(-1, 2, 3)).float()
    grid = affine_grid(theta, [len(there), 1, CELL, CELL], align_corners=False)
    bend = torch.from_numpy(rng.standard_normal((len(there), 2, 4, 4), dtype=np.float32)) * (0.1 * jitter)
    grid = grid + interpolate(bend, (CELL, CELL), mode="bicubic").permute(0, 2, 3, 1)
    alpha = (1.2 * grid_sample(chosen[:, None], grid, align_corners=False)).clamp(0, 1)

    ground = torch.tensor(list(BACKGROUNDS.values())).float()[background]
    canvas = ground[:, None, :, None, None].repeat(1, GRID * GRID, 1, CELL, CELL)
    paint = torch.tensor(list(COLORS.values())).float()[color[scene, corner]][:, :, None, None]
    canvas[scene, corner] = alpha * paint + (1 - alpha) * canvas[scene, corner]
    canvas += torch.from_numpy(rng.standard_normal(canvas.shape, dtype=np.float32) * 5)
    tiles = canvas.clamp(0, 255).byte().view(-1, GRID, GRID, 3, CELL, CELL)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)

"""Procedural scenes: grey textured shapes on a textured ground, with class and per-pixel labels.

Eight textures are told apart by their pattern alone. Every object's texture is standardised, then given its own random
contrast, polarity and brightness, so neither the mean nor the spread of its grey says which texture it is.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from capi.seeding import Purpose, generator

TEXTURES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots", "rings", "grain", "blobs")

# Textures are drawn in units of 1/32 of the image side, so a scene looks the same at every resolution.
_UNITS = 32


class SyntheticScenes:
    """`size` scenes of `image_size` x `image_size` pixels; scene `index` depends on (seed, index, image_size) alone.

    The class label is the texture of the central, largest object; pixel labels are the texture under each pixel, the
    ground's included.
    """

    def __init__(self, size: int, image_size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, got {image_size}")
        self.size = size
        self.image_size = image_size
        self.seed = seed
        centres = (np.arange(image_size, dtype=np.float32) + 0.5) * (_UNITS / image_size) - _UNITS / 2
        self._y = np.repeat(centres, image_size)
        self._x = np.tile(centres, image_size)

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> UInt8[ndarray, "height width 3"]:
        """Scene `index` as grey RGB; raises IndexError outside [0, size)."""
        return self.labelled(index)[0]

    def labelled(self, index: int) -> tuple[UInt8[ndarray, "height width 3"], int, Int[ndarray, "height width"]]:
        """Scene `index`, the class of its central object, and the texture of every pixel (int64, 0 to 7)."""
        if not 0 <= index < self.size:
            raise IndexError(f"scene index must be in [0, {self.size}), got {index}")
        rng = generator(Purpose.SCENE, self.seed, index)
        n_objects = int(rng.integers(2, 5))
        kinds = rng.integers(len(TEXTURES), size=n_objects + 1).tolist()
        grey = _textured(kinds[0], self._x, self._y, rng)
        labels = np.full(self._x.size, kinds[0])
        # The small objects are drawn first, so that the central one is never covered.
        angle = rng.uniform(0, 2 * np.pi)
        for order in range(n_objects - 1, -1, -1):
            central = order == 0
            reach = rng.uniform(0, 4) if central else rng.uniform(13, 17)
            angle += rng.uniform(1.6, 2.6)
            x = self._x - np.float32(reach * np.cos(angle))
            y = self._y - np.float32(reach * np.sin(angle))
            inside = np.flatnonzero(_shape(x, y, rng.uniform(11.5, 14) if central else rng.uniform(5, 7.5), rng))
            kind = kinds[order + 1]
            grey[inside] = _textured(kind, x[inside], y[inside], rng)
            labels[inside] = kind
        grey += np.float32(rng.uniform(-6, 6)) + 20 * rng.standard_normal(grey.size, dtype=np.float32)
        image = np.clip(grey, 0, 255).astype(np.uint8).reshape(self.image_size, self.image_size)
        return (
            np.repeat(image[:, :, None], 3, axis=2),
            kinds[1],
            labels.astype(np.int64).reshape(self.image_size, self.image_size),
        )


def _shape(
    x: Float[ndarray, "pixels"], y: Float[ndarray, "pixels"], radius: float, rng: np.random.Generator
) -> ndarray:
    """Which pixels lie in a random ellipse or in a random triangle, quadrilateral, pentagon or hexagon."""
    stretch = np.exp(rng.uniform(-0.25, 0.25))
    x, y = x / np.float32(radius * stretch), y / np.float32(radius / stretch)
    sides = rng.integers(2, 7)
    if sides == 2:
        return x * x + y * y < 1
    turns = rng.uniform(0, 2 * np.pi) + np.arange(sides) * (2 * np.pi / sides)
    normals = np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)
    # Regular polygons of the unit disc's area.
    apothem = np.sqrt(np.pi / (sides * np.tan(np.pi / sides)))
    return (normals @ np.stack([x, y])).max(axis=0) < apothem


def _textured(
    kind: int, x: Float[ndarray, "pixels"], y: Float[ndarray, "pixels"], rng: np.random.Generator
) -> Float[ndarray, "pixels"]:
    """Grey levels of texture `kind`, standardised over the given pixels, then of random contrast and brightness."""
    field = _texture(TEXTURES[kind], x, y, rng)
    if field.size:
        field -= field.mean()
        field /= np.sqrt(np.vdot(field, field) / field.size) + np.float32(1e-3)
    contrast = rng.uniform(28, 40) * rng.choice((-1, 1))
    return field * np.float32(contrast) + np.float32(rng.uniform(122, 134))


def _texture(
    name: str, x: Float[ndarray, "pixels"], y: Float[ndarray, "pixels"], rng: np.random.Generator
) -> Float[ndarray, "pixels"]:
    """The bare pattern, of random phase, period and small rotation."""
    if name == "grain":
        cells = (np.floor(x).astype(np.int64) % 64) * 64 + np.floor(y).astype(np.int64) % 64
        return rng.standard_normal(64 * 64, dtype=np.float32)[cells]
    if name == "blobs":
        turns = rng.uniform(0, 2 * np.pi, size=6)
        waves = (2 * np.pi / rng.uniform(8, 12, size=6) * np.stack([np.cos(turns), np.sin(turns)])).astype(np.float32)
        phases = rng.uniform(0, 2 * np.pi, size=(6, 1)).astype(np.float32)
        return np.sin(waves.T @ np.stack([x, y]) + phases).sum(axis=0)
    turn = rng.uniform(-0.25, 0.25)
    if name == "vertical stripes":
        turn += np.pi / 2
    if name == "diagonal stripes":
        turn += np.pi / 4 * rng.choice((-1, 1))
    wave = 2 * np.pi / rng.uniform(3.6, 6.4)
    phase_u, phase_v = rng.uniform(0, 2 * np.pi, size=2)
    if name == "rings":
        return np.sin(np.float32(wave) * np.sqrt(x * x + y * y) + np.float32(phase_u))
    cos, sin = np.float32(wave * np.cos(turn)), np.float32(wave * np.sin(turn))
    u = x * cos + y * sin + np.float32(phase_u)
    v = y * cos - x * sin + np.float32(phase_v)
    if name == "checks":
        return np.sign(np.sin(u) * np.sin(v))
    if name == "dots":
        return np.maximum(np.cos(u) + np.cos(v), 0.5)
    return np.sin(v)

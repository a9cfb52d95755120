"""From a drawing to an image: random distortions, their random numbers, and PNG."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import UserError

SIDE = 28  # shift and elastic are given in pixels of an image of this side
NUM_SPREAD = 8  # uniform numbers of an image before those of its control points


@dataclass(frozen=True)
class Distortion:
    """How far images differ from the drawing.

    U(a) is uniform on [-a, a]. Pixels are those of a 28 x 28 image.

    rotation: U, degrees.
    shear:    U.
    scale:    U around 1, for each axis.
    shift:    U, pixels.
    elastic:  standard deviation, in pixels, of the control points' displacement, bicubic between.
    grid:     control points along a side.
    contrast: ink is between 1 - contrast and 1, paper between 0 and contrast / 2.
    noise:    the mean over images of its standard deviation (full ink is 1), which lies between 0
              and twice that.
    """

    rotation: float = 6.0
    shear: float = 0.1
    scale: float = 0.1
    shift: float = 1.0
    elastic: float = 0.6
    grid: int = 5
    contrast: float = 0.3
    noise: float = 0.04

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} = {value}: must be 0 or more")
        if self.grid < 2 or self.scale >= 1 or self.contrast > 1:
            raise UserError(
                f"grid = {self.grid}, scale = {self.scale}, contrast = {self.contrast}: "
                "must be >= 2, < 1, <= 1"
            )

    def times(self, strength: float) -> Distortion:
        """Every amplitude multiplied by `strength`."""
        if not strength >= 0:
            raise UserError(f"strength = {strength}: must be 0 or more")
        scaled = {name: value * strength for name, value in asdict(self).items()}
        scaled["grid"] = self.grid
        scaled["contrast"] = min(1.0, scaled["contrast"])
        return Distortion(**scaled)


def distort(
    drawings: Tensor, uniform: np.ndarray, noise: Tensor, size: int, distortion: Distortion
) -> Tensor:
    """Distorted images, uint8 [B, size, size], of uint8 drawings [B, S, S] with ink 255 on 0.

    uniform: float32 [B, num_uniform(distortion)] in [0, 1).
    noise: [B, size, size], added. Full ink is 1.
    """
    u = torch.from_numpy(uniform)
    spread = u[:, :NUM_SPREAD]
    field = _affine_field(spread * 2 - 1, size, distortion)
    if distortion.elastic:
        field += _elastic_field(u[:, NUM_SPREAD:], size, distortion)
    ink = drawings[:, None].float() / 255
    grid = field.view(-1, size, size, 2)
    images = F.grid_sample(ink, grid, mode="bilinear", align_corners=False)[:, 0]
    full = 1 - spread[:, 6, None, None] * distortion.contrast
    paper = spread[:, 7, None, None] * (distortion.contrast / 2)
    images = paper + images * (full - paper)
    images += noise
    return (images.clamp_(0, 1) * 255).round_().byte()


def _affine_field(both_ways: Tensor, size: int, distortion: Distortion) -> Tensor:
    """[B, size * size, 2]: where each pixel is read, in grid_sample's unit (half a side).

    both_ways: [B, 8] in [-1, 1): rotation, shear, two scales, two shifts. The rest is not used.
    """
    angle = both_ways[:, 0] * (distortion.rotation * np.pi / 180)
    shear = both_ways[:, 1] * distortion.shear
    scale_x, scale_y = (1 + both_ways[:, 2:4] * distortion.scale).unbind(1)
    shift = both_ways[:, 4:6] * (distortion.shift * 2 / SIDE)
    cos, sin = angle.cos(), angle.sin()
    rows_x = torch.stack([cos * scale_x, (shear - sin) * scale_x, shift[:, 0]], 1)
    rows_y = torch.stack([sin * scale_y, cos * scale_y, shift[:, 1]], 1)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([x.flatten(), y.flatten(), torch.ones(size * size)])
    return torch.stack([rows_x @ plane, rows_y @ plane], -1)


def _elastic_field(uniform: Tensor, size: int, distortion: Distortion) -> Tensor:
    """[B, size * size, 2]: the smooth displacement of each pixel.  uniform: [B, 2 * grid**2]."""
    # Box and Muller: two independent normals, the two directions of a control point.
    radius = (-2 * torch.log1p(-uniform[:, 0::2])).sqrt() * (distortion.elastic * 2 / SIDE)
    turn = uniform[:, 1::2] * (2 * np.pi)
    weights = bicubic_weights(distortion.grid, size)
    return torch.stack([(radius * turn.cos()) @ weights, (radius * turn.sin()) @ weights], -1)


def bicubic_weights(grid: int, size: int) -> Tensor:
    """[grid * grid, size * size]: each control point's weight in the displacement of each pixel."""
    points = torch.eye(grid * grid).view(-1, 1, grid, grid)
    weights = F.interpolate(points, size=(size, size), mode="bicubic", align_corners=True)
    return weights.view(grid * grid, -1)


def num_uniform(distortion: Distortion) -> int:
    """Random numbers of one image's geometry and contrast."""
    return NUM_SPREAD + 2 * distortion.grid**2


def random_uniform(
    seed: int, split: str, codes: np.ndarray, k: np.ndarray, draws: int
) -> np.ndarray:
    """float32 [B, draws] in [0, 1): each one a hash of (seed, split, codes[b], k[b], draw)."""
    digest = hashlib.blake2b(f"{seed}/{split}".encode(), digest_size=8).digest()
    start = np.frombuffer(digest, np.uint64)
    image = _mix(_mix(start + codes.astype(np.uint64)) + k.astype(np.uint64))
    draw = _mix(np.arange(1, draws + 1, dtype=np.uint64))
    return (_mix(image[:, None] ^ draw) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step on uint64.  Steele, Lea and Flood 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def png(image: bytes, size: int) -> bytes:
    """A gray PNG of `size` rows, each a zero byte and `size` pixels.

    Ours and not Pillow's, which takes longer than all the rest of the rendering.  Small images are
    stored uncompressed: in a tar they take the same two blocks of 512 bytes either way.
    """
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    level = 0 if len(image) < 950 else 1
    body = zlib.compress(image, level)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

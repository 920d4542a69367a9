"""Random changes to training images that keep their class, as batched tensor code."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes that keep an image's class: which ones do belongs to the data set, not to the method.

    Angles in degrees; `shift` is a fraction of the side; `zoom`, `shear` and `light` are relative amplitudes; `blur` is
    the share of images that are blurred, by up to a 3x3 box.
    Mirroring is off unless a data set asks for it: a mirrored "keep left" is a "keep right".
    """

    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    light: float = 0.0
    blur: float = 0.0
    mirror: bool = False

    def times(self, factor: float) -> Self:
        """All of it so much stronger; 0 is none at all, not even a mirror."""
        amplitudes = {name: getattr(self, name) * factor for name in ("rotate", "shift", "zoom", "shear", "light")}
        return replace(self, **amplitudes, blur=min(1.0, self.blur * factor), mirror=self.mirror and factor > 0)


def draw(n: int, channels: int, how: Augmentation, rng: torch.Generator) -> Tensor:
    """The random numbers of [0, 1) that `n` images are changed by, a row (K,) for each.

    From `rng` on the CPU, so that a seed means the same on every device; all of an epoch's at once, so that they go to
    a device in one piece.
    """
    return torch.rand(n, sum(_columns(how, channels)), generator=rng)


def augment(images: Tensor, how: Augmentation, drawn: Tensor) -> Tensor:
    """Randomly changed copies, float (N, C, S, S) of range about 0 to 255, of uint8 images, each by its row of `drawn`.

    What is applied to all pixels is gathered first: as few passes over the images as there are kinds of change.
    """
    x = images.float()
    channels, side = x.shape[1], x.shape[-1]
    place, light, blur = torch.split(drawn, _columns(how, channels), dim=1)
    if place.shape[1]:
        x = F.grid_sample(x, _grid(place * 2 - 1, how, side), padding_mode="border", align_corners=False)
    if light.shape[1]:
        u = light * 2 - 1
        contrast, brightness = (u[:, i, None, None, None].mul(how.light).exp() for i in (0, 1))
        colour = u[:, 4:, None, None].mul(how.light * 0.3).exp()
        # ((x - mean) * contrast + mean * brightness) * colour
        level = x.mean((1, 2, 3), keepdim=True) * (brightness - contrast)
        x = torch.addcmul(level * colour, x, contrast * colour).clamp_(0, 255)
        # Half of a sign in the shade: light that changes linearly across the image.
        ramp = torch.linspace(-1, 1, side, device=x.device)
        slope = u[:, 2:4, None, None] * how.light
        x.mul_((1 + slope[:, :1] * ramp + slope[:, 1:] * ramp[:, None]).clamp_(min=0.1))
    if blur.shape[1]:
        strength = ((how.blur - blur) / how.blur).clamp_(min=0)[:, :, None, None]  # zero for the others
        # A 3x3 box is a band along each axis: two small products of matrices, which the edges need no care in.
        band = torch.ones(side, side, device=x.device).tril(1).triu(-1)
        band /= band.sum(1, keepdim=True)
        x = x.lerp(band @ (x @ band.T), strength)
    return x


def _columns(how: Augmentation, channels: int) -> list[int]:
    """How many random numbers an image takes for its place, its light and its blur."""
    moved = how.rotate or how.zoom or how.shear or how.shift or how.mirror
    return [7 if moved else 0, 4 + channels if how.light else 0, 1 if how.blur else 0]


def _grid(u: Tensor, how: Augmentation, side: int) -> Tensor:
    """Where each pixel is taken from (N, S, S, 2), in -1 to 1 across the image, as `affine_grid` has it."""
    angle = u[:, 0] * math.radians(how.rotate)
    size, stretch = 1 + u[:, 1] * how.zoom, 1 + u[:, 2] * how.zoom / 2
    along = torch.stack([size * stretch * angle.cos(), size * angle.sin()], dim=1)  # from a step along a row
    down = torch.stack([u[:, 3] * how.shear - size * angle.sin(), size * angle.cos()], dim=1)
    if how.mirror:
        along = along * torch.where(u[:, 6:] < 0, -1.0, 1.0)
    centres = (torch.arange(side, device=u.device) * 2 + 1) / side - 1
    rows = centres[:, None] * down[:, None] + u[:, None, 4:6] * 2 * how.shift  # the image spans -1 to 1
    return (centres[:, None] * along[:, None])[:, None] + rows[:, :, None]

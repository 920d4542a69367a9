"""Random changes to training images that keep their class, as batched tensor code."""

import math
from dataclasses import dataclass

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


def augment(images: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """Randomly changed copies, float (N, C, S, S) of range about 0 to 255, of uint8 images, each on its own.

    Random numbers come from `rng` on the CPU, so that a seed means the same on every device.
    """
    x = images.float()
    n, channels, side = len(x), x.shape[1], x.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=rng) * 2 - 1

    if how.rotate or how.zoom or how.shear or how.shift or how.mirror:
        angle = uniform() * math.radians(how.rotate)
        size, stretch = 1 + uniform() * how.zoom, 1 + uniform() * how.zoom / 2
        matrix = torch.zeros(n, 2, 3)
        matrix[:, 0, 0] = size * stretch * angle.cos()
        matrix[:, 0, 1] = uniform() * how.shear - size * angle.sin()
        matrix[:, 1, 0] = size * angle.sin()
        matrix[:, 1, 1] = size * angle.cos()
        matrix[:, :, 2] = uniform(2) * 2 * how.shift  # the image spans -1 to 1
        if how.mirror:
            matrix[:, :, 0] *= torch.where(uniform() < 0, -1.0, 1.0)[:, None]
        grid = F.affine_grid(matrix.to(x.device), [n, channels, side, side], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if how.light:
        contrast, brightness = (uniform(1, 1, 1).mul(how.light).exp().to(x.device) for _ in range(2))
        colour = uniform(channels, 1, 1).mul(how.light * 0.3).exp().to(x.device)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (((x - mean) * contrast + mean * brightness) * colour).clamp(0, 255)
        # Half of a sign in the shade: light that changes linearly across the image.
        ramp = torch.linspace(-1, 1, side, device=x.device)
        slope = (uniform(2, 1, 1) * how.light).to(x.device)
        x = x * (1 + slope[:, :1] * ramp + slope[:, 1:] * ramp[:, None]).clamp(min=0.1)
    if how.blur:
        drawn = torch.rand(n, 1, 1, 1, generator=rng)
        strength = ((how.blur - drawn) / how.blur).clamp(min=0).to(x.device)  # zero for the others
        x = x + strength * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
    return x

"""Which convolutions a CPU gets wrong in bfloat16: random shapes, forward and both gradients against float64.

    python -m benchmarks.kernels --seconds 400

Claim: where `training` trusts bfloat16, results differ from float64's by less than 3 % of the largest value, whatever
was in the memory before. Prints each shape that is wrong, and whether `training` does it in float32; ends with code 1
where it does not.
"""

import argparse
import copy
import random
import sys
import time

import torch
from torch import nn

from camri_tune.training import _again_in_float32

SIDES = (1, 2, 3, 4, 5, 7, 8, 14, 16, 28, 32, 56)
CHANNELS = (1, 3, 16, 24, 32, 48, 64, 96, 100, 128, 256, 512)
MOST_WORK = 3e7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    numbers = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    started, shapes, wrong, missed = time.monotonic(), 0, 0, 0
    while time.monotonic() - started < arguments.seconds:
        drawn = _drawn(numbers)
        if drawn is None:
            continue
        convolution, images = drawn
        shapes += 1
        if not (bad := _wrong(convolution, images)):
            continue
        wrong += 1
        convolution.register_forward_hook(_again_in_float32)
        left = _wrong(convolution, images)
        missed += bool(left)
        print(f"{tuple(images.shape)} {convolution}: {', '.join(bad)}; in training {'WRONG' if left else 'right'}")
    print(f"{shapes} shapes, {wrong} wrong in bfloat16, {missed} of them in training; torch {torch.__version__}")
    return int(missed > 0)


def _drawn(numbers: random.Random) -> tuple[nn.Conv2d, torch.Tensor] | None:
    """A convolution and its input, unless they do not fit or take long."""
    side, kernel = numbers.choice(SIDES), numbers.choice((1, 2, 3, 4, 5, 7))
    stride, dilation = numbers.choice((1, 2, 2, 3, 4)), numbers.choice((1, 1, 1, 2))
    padding = numbers.choice((0, (kernel - 1) // 2, kernel // 2)) * dilation
    inputs, outputs = numbers.choice(CHANNELS), numbers.choice(CHANNELS)
    groups = 1
    if numbers.random() < 0.2:
        groups, outputs = inputs, inputs
    if side + 2 * padding < dilation * (kernel - 1) + 1:
        return None
    if inputs // groups * outputs * kernel**2 * max(1, side // stride) ** 2 > MOST_WORK:
        return None
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    images = torch.randn(numbers.choice((2, 16, 32)), inputs, side, side)
    if numbers.random() < 0.7:
        convolution = convolution.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    return convolution, images


def _wrong(convolution: nn.Conv2d, images: torch.Tensor) -> list[str]:
    """Which of output, gradient of the input and gradient of the kernel are wrong, in any of three tries."""
    with torch.no_grad():  # both are to compute with the same numbers
        convolution.weight.copy_(convolution.weight.bfloat16())
    images = images.bfloat16().float()
    # Not in float32: 1x1 kernels with a stride and few inputs write beyond their memory there (oneDNN issue 6035).
    expected = _results(copy.deepcopy(convolution).double(), images.double(), fast=False)
    found = [
        name
        for _ in range(3)
        for (name, value), right in zip(
            _results(convolution, images, fast=True).items(), expected.values(), strict=True
        )
        if not (value - right).abs().max() <= 0.03 * right.abs().max() + 1e-6  # NaN is wrong, too
    ]
    return sorted(set(found))


def _results(convolution: nn.Conv2d, images: torch.Tensor, *, fast: bool) -> dict[str, torch.Tensor]:
    images = images.clone().requires_grad_()
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        output = convolution(images)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    _spoil(output, images, convolution.weight)
    output.backward(slope.to(output.dtype))
    assert images.grad is not None
    assert convolution.weight.grad is not None
    return {"output": output.detach(), "images": images.grad, "kernel": convolution.weight.grad.clone()}


def _spoil(*like: torch.Tensor) -> None:
    """Fill memory with NaN and give it back: what reads before it writes shows itself."""
    spoilt = [torch.full((x.numel() * times,), float("nan"), dtype=kind) for x in like for times, kind in _PIECES]
    del spoilt


_PIECES = [(times, kind) for times in (1, 2) for kind in (torch.float32, torch.bfloat16)]


if __name__ == "__main__":
    sys.exit(main())

"""Muon, an optimizer that makes much of few steps: a weight goes along its momentum, made orthogonal.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the weight decay of Liu et al.,
"Muon is scalable for LLM training" (2025). PyTorch's own takes matrices alone, not the kernels of convolutions.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camri_tune.optimizers import AdamW, Group

# Short trainings forget fast: with 120 steps in all, 0.95 loses three points of GTSRB's accuracy (docs/measured.md).
MOMENTUM = 0.8
# Liu et al. have 0.2, which makes a step as large as AdamW's. Four times that is good at rates that are good for what
# AdamW moves beside it; with half of it or twice as much GTSRB's accuracy was the same (n = 2 seeds each).
SIZE = 0.8
# A quintic that in five rounds takes singular values of 0.01 to 1 to between 0.68 and 1.21 (Jordan et al.).
_QUINTIC = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_LEAST = 1e-30  # the least sum of a matrix's squares: float32 still has its inverse
# On a GPU smaller Gram matrices are made as large as this: one large batch takes less time than several small ones.
_SMALL = 128


class Muon(AdamW):
    """Muon for the parameters of groups that are `orthogonal`, AdamW for those of the others.

    A weight (R, ...) counts as a matrix of R rows.
    """

    def _move(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """All at once: on a GPU kernels as small as these cost their launch, not their work."""
        if not group.orthogonal:
            super()._move(group, parameters, gradients)
            return
        momenta = self._kept("momentum", parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        # Nesterov's. In channels_last, which kernels lie in, the order of columns is that of memory: nothing is copied.
        ahead = [a.movedim(1, -1) for a in torch._foreach_lerp(gradients, momenta, MOMENTUM)]
        flat = orthogonal([a.flatten(1) for a in ahead], least=_SMALL if parameters[0].is_cuda else 0)
        directions = [d.view(a.shape).movedim(-1, 1) for d, a in zip(flat, ahead, strict=True)]
        torch._foreach_mul_(directions, [SIZE * math.sqrt(max(matrix.shape)) for matrix in flat])
        torch._foreach_mul_(directions, group.rate)
        torch._foreach_mul_(parameters, 1 - group.rate * group.weight_decay)
        torch._foreach_sub_(parameters, directions)


def orthogonal(matrices: Sequence[Tensor], least: int = 0) -> list[Tensor]:
    """The singular vectors of each matrix (R, K) with singular values of about 1, whatever its own are; zero of zero.

    What is below a thousandth or so of the largest stays smaller, and so does all of a matrix of norm below 1e-18; the
    squares of one of norm above 1e19 overflow in float32. The work is done on Gram matrices, those of one size
    together; those of fewer than `least` rows are filled up with zeros to that size.
    """
    grams = [m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m for m in matrices]
    alike: dict[int, list[int]] = defaultdict(list)
    for place, gram in enumerate(grams):
        alike[max(len(gram), least)].append(place)
    made = list(matrices)
    for size, places in alike.items():
        filled = [grams[p] if len(grams[p]) == size else F.pad(grams[p], (0, size - len(grams[p])) * 2) for p in places]
        # x, then (a + b xx' + c (xx')^2) x and so on: all factors are polynomials of xx' (or of x'x), which is small.
        for place, factor in zip(places, _factors(torch.stack(filled)), strict=True):
            x, rows = matrices[place], len(grams[place])
            mine = factor[:rows, :rows]
            made[place] = mine @ x if x.shape[0] <= x.shape[1] else x @ mine
    return made


def _factors(grams: Tensor) -> Tensor:
    """What makes each x orthogonal when multiplied with it, by its xx' or x'x, (N, R, R)."""
    a, b, c = _QUINTIC
    squares = grams.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp(min=_LEAST)
    grams = grams / squares
    product = torch.eye(grams.shape[1], device=grams.device, dtype=grams.dtype) / squares.sqrt()
    for last in (False,) * (_ROUNDS - 1) + (True,):
        rest = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)  # this round's factor is a + rest
        product = torch.baddbmm(product, rest, product, beta=a)
        if not last:
            grams = torch.baddbmm(grams, rest, grams, beta=a)
            grams = torch.baddbmm(grams, grams, rest, beta=a)
    return product

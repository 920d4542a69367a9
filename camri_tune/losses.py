"""Classification heads with their training losses.

Each head maps embeddings (N, D) to logits (N, C) with `get_logits`, which takes no label and no margin: that is
inference. Called with labels it returns the training loss, a scalar, the mean over the batch. Names and argument order
follow pytorch-metric-learning; margins are in radians (that library takes degrees).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_LIMIT = 1 - 1e-6  # d cos(theta + m) / d cos(theta) is infinite at 1


class CrossEntropyLoss(nn.Module):
    """Softmax cross-entropy over a dense layer with bias: the baseline."""

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embedding_size, num_classes)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C) of embeddings (N, D), in float32 (float64 stays)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(_at_least_float32(embeddings), self.dense.weight, self.dense.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.get_logits(embeddings), labels)


class NormFaceLoss(nn.Module):
    """Softmax over scaled cosines, `s * cos(theta_k)`: embeddings and class weights both normalised.

    Wang et al. 2017. The CAMRI poster calls it L2-constrained softmax; it is CAMRI with every margin zero.
    """

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 16.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}, but must be a finite number above 0 (the paper uses 8 and 16)")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_normal_(self.weight)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """cos(theta_k) (N, C). Float32 with autocast off: bfloat16 cannot tell 0 from 5 degrees."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(_at_least_float32(embeddings)), F.normalize(self.weight))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C), `s * cos(theta_k)`: no margin, no label."""
        return self.scale * self.cosine(embeddings)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = self.cosine(embeddings)
        column = labels[:, None]
        with torch.autocast(embeddings.device.type, enabled=False):
            target = self.with_margin(cosine.gather(1, column), column)
            return F.cross_entropy(self.scale * cosine.scatter(1, column, target), labels)

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """What the loss puts in place of the target's cosine. Both (N, 1). Here: the cosine itself."""
        return cosine


class _MarginLoss(NormFaceLoss):
    """A cosine softmax whose target column is made harder by a margin that depends on the target class."""

    margins: Tensor

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | Mapping[int, float], scale: float, most: float
    ) -> None:
        super().__init__(num_classes, embedding_size, scale)
        by_class = margin if isinstance(margin, Mapping) else dict.fromkeys(range(num_classes), margin)
        margins = torch.zeros(num_classes)
        for c, value in by_class.items():
            if not 0 <= c < num_classes:
                raise ValueError(f"margin names class {c}, but classes are 0 to {num_classes - 1}")
            if not 0 <= value < most:
                raise ValueError(f"margin of class {c} is {value}, but must be at least 0 and below {most:.4g}")
            margins[c] = value
        # Not saved with the weights: an exported model has no margin.
        self.register_buffer("margins", margins, persistent=False)


class CAMRILoss(_MarginLoss):
    """CAMRI loss (Nishiyama et al., IJCNN 2022): an angular margin for the important classes alone.

    `-log exp(s cos(theta_y + m_y)) / (exp(s cos(theta_y + m_y)) + sum_{k != y} exp(s cos(theta_k)))`, with m_y = 0
    unless y is important. `margin` maps class index to radians in [0, pi). Where theta + m passes pi,
    `-2 - cos(theta + m)` goes on: continuous, with a continuous slope, and falling over all of theta in [0, pi].
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: Mapping[int, float], scale: float = 16.0) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, most=math.pi)

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        margin = self.margins.to(cosine.dtype)[labels]
        # Only the sine needs the clamp: its slope is what explodes. At m = 0 the cosine passes through untouched.
        inside = cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT)
        sine = torch.sqrt((1 - inside) * (1 + inside))
        shifted = cosine * margin.cos() - sine * margin.sin()
        past_pi = (margin > 0) & (cosine < -margin.cos())
        return torch.where(past_pi, -2 - shifted, shifted)


class ArcFaceLoss(CAMRILoss):
    """ArcFace (Deng et al., CVPR 2019): the same angular margin, in radians, for every class."""

    def __init__(self, num_classes: int, embedding_size: int, margin: float, scale: float = 16.0) -> None:
        super().__init__(num_classes, embedding_size, dict.fromkeys(range(num_classes), margin), scale)


class CosFaceLoss(_MarginLoss):
    """CosFace (Wang et al., CVPR 2018) for the important classes alone: target `s * (cos(theta_y) - m_y)`.

    The twin of CAMRI without an angle, for ablation. `margin` maps class index to a cosine difference in [0, 2).
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: Mapping[int, float], scale: float = 16.0) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, most=2.0)

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        return cosine - self.margins.to(cosine.dtype)[labels]


Head = CrossEntropyLoss | NormFaceLoss


def adacos_scale(num_classes: int) -> float:
    """AdaCos's fixed scale, `sqrt(2) log(C - 1)` (Zhang et al., CVPR 2019): where cosine softmax has useful slope."""
    return math.sqrt(2) * math.log(max(num_classes - 1, 2))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

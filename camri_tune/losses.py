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

    label_smoothing = 0.0  # of the target's probability, the share that goes to all classes alike

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embedding_size, num_classes)

    @property
    def class_weights(self) -> Tensor:
        """The direction in which each class lies (C, D)."""
        return self.dense.weight

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C) of embeddings (N, D), in float32 (float64 stays)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(*map(_at_least_float32, (embeddings, self.dense.weight, self.dense.bias)))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.get_logits(embeddings), labels, label_smoothing=self.label_smoothing)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)


class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy whose terms of class c weigh `weight[c]`; classes that are not named weigh 1.

    `-w_y log h_y` (Panchapagesan et al. 2016), averaged over the batch's size: PyTorch's own `weight` divides by the
    sum of the weights, which takes part of the weight back. `weight` maps class index to a factor of at least 0.
    """

    weights: Tensor

    def __init__(self, num_classes: int, embedding_size: int, weight: Mapping[int, float]) -> None:
        super().__init__(num_classes, embedding_size)
        # Not saved with the weights of the network: inference needs no loss.
        self.register_buffer("weights", _per_class("weight", weight, num_classes, default=1.0), persistent=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        losses = self._cross_entropy(self.get_logits(embeddings), labels)
        return (self.weights[labels] * losses).mean()


class CRWWCELoss(CrossEntropyLoss):
    """Categorical real-world-weight cross-entropy (Ho and Wookey, IEEE Access 2020, arXiv 2001.00570).

    `-[w_fn[y] log h_y + sum_{k != y} w_fp[y, k] log(1 - h_k)]`, averaged over the batch: a true image of class y costs
    w_fn[y] for what its own probability lacks and w_fp[y, k] for what each wrong class k has. `w_fn` maps class index
    to a factor (1 for classes that are not named); `w_fp` maps class y to the factor of its whole row (0 for others),
    or is the matrix (C, C), whose diagonal is not read. With every w_fp zero it is weighted cross-entropy.
    """

    w_fn: Tensor
    w_fp: Tensor

    def __init__(
        self, num_classes: int, embedding_size: int, w_fn: Mapping[int, float], w_fp: Mapping[int, float] | Tensor
    ) -> None:
        super().__init__(num_classes, embedding_size)
        if isinstance(w_fp, Tensor):
            shape = (num_classes, num_classes)
            wrong = w_fp[~((w_fp >= 0) & w_fp.isfinite())].tolist() if w_fp.shape == shape else []
            if w_fp.shape != shape or wrong:
                found = f"holds {wrong[0]}" if wrong else f"has the shape {tuple(w_fp.shape)}"
                raise ValueError(f"w_fp {found}, but must be a matrix {shape} of finite factors of at least 0")
            matrix = w_fp.to(torch.float32, copy=True)
        else:
            matrix = _per_class("w_fp", w_fp, num_classes, default=0.0)[:, None].repeat(1, num_classes)
        matrix.fill_diagonal_(0)
        self.register_buffer("w_fn", _per_class("w_fn", w_fn, num_classes, default=1.0), persistent=False)
        self.register_buffer("w_fp", matrix, persistent=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        logits = self.get_logits(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            missed = self.w_fn[labels] * self._cross_entropy(logits, labels)
            return (missed - (self.w_fp[labels] * log_complement(logits)).sum(dim=1)).mean()


def log_complement(logits: Tensor) -> Tensor:
    """log(1 - h_k) (N, C) of the softmax h of logits (N, C), also where h_k is almost 1; finite gradients."""
    # The largest at 0: what all logits have in common would only be rounded.
    logits = logits - logits.detach().amax(dim=1, keepdim=True)
    everything = logits.logsumexp(dim=1, keepdim=True)
    classes = torch.arange(logits.shape[1], device=logits.device)
    top = logits.argmax(dim=1, keepdim=True) == classes  # one_hot would read its largest value back in every step
    # Only the largest h can come near 1, and for it alone is 1 - h the sum of the others; all others are at most 1/2.
    others = logits.masked_fill(top, -math.inf)
    return torch.where(
        top, others.logsumexp(dim=1, keepdim=True) - everything, torch.log1p(-(others - everything).exp())
    )


class NormFaceLoss(nn.Module):
    """Softmax over scaled cosines, `s * cos(theta_k)`: embeddings and class weights both normalised.

    Wang et al. 2017. The CAMRI poster calls it L2-constrained softmax; it is CAMRI with every margin zero.
    """

    label_smoothing = 0.0  # as in CrossEntropyLoss

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 16.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}, but must be a finite number above 0 (the paper uses 8 and 16)")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_normal_(self.weight)

    @property
    def class_weights(self) -> Tensor:
        """The direction in which each class lies (C, D)."""
        return self.weight

    def cosine(self, embeddings: Tensor) -> Tensor:
        """cos(theta_k) (N, C). Float32 with autocast off: bfloat16 cannot tell 0 from 5 degrees."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(*(F.normalize(_at_least_float32(each)) for each in (embeddings, self.weight)))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C), `s * cos(theta_k)`: no margin, no label."""
        return self.scale * self.cosine(embeddings)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = self.cosine(embeddings)
        column = labels[:, None]
        with torch.autocast(embeddings.device.type, enabled=False):
            target = self.with_margin(cosine.gather(1, column), column)
            logits = self.scale * cosine.scatter(1, column, target)
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """What the loss puts in place of the target's cosine. Both (N, 1). Here: the cosine itself."""
        return cosine


class _MarginLoss(NormFaceLoss):
    """A cosine softmax whose target column is made harder by a margin that depends on the target class."""

    margins: Tensor

    def __init__(
        self, num_classes: int, embedding_size: int, margin: Mapping[int, float], scale: float, most: float
    ) -> None:
        super().__init__(num_classes, embedding_size, scale)
        margins = _per_class("margin", margin, num_classes, default=0.0, most=most)
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


def _per_class(
    name: str, values: Mapping[int, float], num_classes: int, *, default: float, most: float = math.inf
) -> Tensor:
    """One value per class (C,), those not named at `default`."""
    tensor = torch.full((num_classes,), default)
    for c, value in values.items():
        if not 0 <= c < num_classes:
            raise ValueError(f"{name} names class {c}, but classes are 0 to {num_classes - 1}")
        if not 0 <= value < most:
            rule = f"at least 0 and below {most:.4g}" if math.isfinite(most) else "a finite number of at least 0"
            raise ValueError(f"{name} of class {c} is {value}, but must be {rule}")
        tensor[c] = value
    return tensor


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

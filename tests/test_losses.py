"""Heads and losses against naive re-derivations, and at the angles where such losses go wrong."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as metric_learning
from torch import Tensor
from torch.func import functional_call

from camri_tune.losses import (
    ArcFaceLoss,
    CAMRILoss,
    CosFaceLoss,
    CrossEntropyLoss,
    CRWWCELoss,
    Head,
    NormFaceLoss,
    WeightedCrossEntropyLoss,
    adacos_scale,
    log_complement,
)

CLASSES, SIZE = 5, 7
MARGINS = {1: 0.3, 3: 1.9}
MakeHead = Callable[[], Head]
SomeHead = TypeVar("SomeHead", bound=Head)
COSINE_HEADS: dict[str, Callable[[], NormFaceLoss]] = {
    "l2": lambda: NormFaceLoss(CLASSES, SIZE, 12.0),
    "camri": lambda: CAMRILoss(CLASSES, SIZE, MARGINS, 12.0),
    "arcface": lambda: ArcFaceLoss(CLASSES, SIZE, 0.4, 12.0),
    "cosface-i": lambda: CosFaceLoss(CLASSES, SIZE, {1: 0.2, 3: 1.5}, 12.0),
}
WEIGHTS = {1: 3.0, 3: 0.25}
DENSE_HEADS: dict[str, Callable[[], CrossEntropyLoss]] = {
    "ce": lambda: CrossEntropyLoss(CLASSES, SIZE),
    "wce": lambda: WeightedCrossEntropyLoss(CLASSES, SIZE, WEIGHTS),
    "crwwce": lambda: CRWWCELoss(CLASSES, SIZE, WEIGHTS, {1: 0.5, 2: 2.0}),
    "crwwce matrix": lambda: CRWWCELoss(CLASSES, SIZE, {}, torch.arange(CLASSES**2).view(CLASSES, CLASSES) / 8),
}
HEADS: dict[str, MakeHead] = {**DENSE_HEADS, **COSINE_HEADS}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
every_dense_head = pytest.mark.parametrize("make", DENSE_HEADS.values(), ids=DENSE_HEADS.keys())
every_cosine_head = pytest.mark.parametrize("make", COSINE_HEADS.values(), ids=COSINE_HEADS.keys())
SEEDS = st.integers(0, 2**31 - 1)
# Below the sine's clamp (cosine above 1 - 1e-6) the target may be off by the cosine that is cut away there.
CLAMPED = 2e-6


def _batch(seed: int, n: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Embeddings of very different lengths, and labels in which every class occurs."""
    rng = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, SIZE, generator=rng, dtype=dtype)
    lengths = torch.logspace(-3, 3, n, dtype=dtype)[torch.randperm(n, generator=rng)]
    return embeddings * lengths[:, None], torch.arange(n) % CLASSES


def _with_weight(head: SomeHead, seed: int) -> SomeHead:
    """The head with weights that depend on `seed` alone."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return head


def _angle(x: Sequence[float], w: Sequence[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(x, w, strict=True))
    return math.acos(max(-1.0, min(1.0, dot / (math.hypot(*x) * math.hypot(*w)))))


def _naive_target(angle: float, margin: float) -> float:
    return math.cos(angle + margin) if angle + margin <= math.pi else -2 - math.cos(angle + margin)


def _naive_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, target: Callable[[float, int], float], scale: float
) -> float:
    """Sample by sample, with real angles: `target(angle, label)` stands in place of the label's cosine."""
    losses = []
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        angles = [_angle(x, w) for w in weight.tolist()]
        powers = [math.exp(scale * (target(a, y) if k == y else math.cos(a))) for k, a in enumerate(angles)]
        losses.append(-math.log(powers[y] / math.fsum(powers)))
    return math.fsum(losses) / len(losses)


def _loss_and_gradients(head: Head, embeddings: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss, and its gradients for the embeddings and every parameter."""
    leaf = embeddings.detach().clone().requires_grad_()
    loss = head(leaf, labels)
    return [loss.detach(), *torch.autograd.grad(loss, [leaf, *head.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "zero",
    [
        lambda: CAMRILoss(CLASSES, SIZE, {}, 12.0),
        lambda: CAMRILoss(CLASSES, SIZE, {1: 0.0, 3: 0.0}, 12.0),
        lambda: ArcFaceLoss(CLASSES, SIZE, 0.0, 12.0),
        lambda: CosFaceLoss(CLASSES, SIZE, {2: 0.0}, 12.0),
    ],
    ids=["no margin", "camri", "arcface", "cosface-i"],
)
def test_a_margin_of_zero_is_the_cosine_softmax_bit_for_bit(zero: MakeHead, dtype: torch.dtype) -> None:
    head = _with_weight(zero(), 1).to(dtype)
    plain = _with_weight(NormFaceLoss(CLASSES, SIZE, 12.0), 1).to(dtype)
    embeddings, labels = _batch(2, dtype=dtype)
    # Also where the cosine is 1 and -1, where a clamp would show.
    embeddings = torch.cat([embeddings, 3 * plain.weight.detach(), -plain.weight.detach()])
    labels = torch.cat([labels, torch.arange(CLASSES), torch.arange(CLASSES)])
    for ours, theirs in zip(
        _loss_and_gradients(head, embeddings, labels), _loss_and_gradients(plain, embeddings, labels), strict=True
    ):
        assert torch.equal(ours, theirs)


@given(
    seed=SEEDS,
    margins=st.dictionaries(st.integers(0, CLASSES - 1), st.floats(0, 3.125, width=32), max_size=CLASSES),
    scale=st.floats(1, 40),
)
@settings(deadline=None, max_examples=60)
def test_camri_is_the_papers_formula_with_real_angles(seed: int, margins: dict[int, float], scale: float) -> None:
    head = _with_weight(CAMRILoss(CLASSES, SIZE, margins, scale), seed).double()
    embeddings, labels = _batch(seed + 1)
    naive = _naive_loss(embeddings, head.weight, labels, lambda a, y: _naive_target(a, margins.get(y, 0.0)), scale)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.125, 0.5, 3.0])
def test_arcface_is_its_formula_with_real_angles(margin: float) -> None:
    head = _with_weight(ArcFaceLoss(CLASSES, SIZE, margin, 9.0), 3).double()
    embeddings, labels = _batch(4)
    naive = _naive_loss(embeddings, head.weight, labels, lambda a, _: _naive_target(a, margin), 9.0)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9)


def test_cosface_subtracts_from_the_cosine_of_the_important_classes() -> None:
    margins = {0: 0.25, 4: 1.75}
    head = _with_weight(CosFaceLoss(CLASSES, SIZE, margins, 9.0), 5).double()
    embeddings, labels = _batch(6)
    naive = _naive_loss(embeddings, head.weight, labels, lambda a, y: math.cos(a) - margins.get(y, 0.0), 9.0)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9)


def test_norm_face_is_its_formula_with_real_angles() -> None:
    head = _with_weight(NormFaceLoss(CLASSES, SIZE, 9.0), 5).double()
    embeddings, labels = _batch(6)
    naive = _naive_loss(embeddings, head.weight, labels, lambda a, _: math.cos(a), 9.0)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9)


def test_cross_entropy_is_a_dense_layer_with_bias_and_softmax() -> None:
    head = _with_weight(CrossEntropyLoss(CLASSES, SIZE), 7).double()
    embeddings, labels = torch.randn(20, SIZE, dtype=torch.float64), torch.arange(20) % CLASSES
    weight, bias = head.dense.weight.tolist(), head.dense.bias.tolist()
    losses = []
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        logits = [math.fsum(a * b for a, b in zip(x, w, strict=True)) + c for w, c in zip(weight, bias, strict=True)]
        losses.append(math.log(math.fsum(map(math.exp, logits))) - logits[y])
    assert head(embeddings, labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


@pytest.mark.parametrize("margin", [0.05, 0.5, 1.2])
def test_equal_margins_on_all_classes_are_arcface(margin: float) -> None:
    arcface = _with_weight(ArcFaceLoss(CLASSES, SIZE, margin, 12.0), 8)
    camri = _with_weight(CAMRILoss(CLASSES, SIZE, dict.fromkeys(range(CLASSES), margin), 12.0), 8)
    embeddings, labels = _batch(9, dtype=torch.float32)
    assert torch.equal(arcface(embeddings, labels), camri(embeddings, labels))
    assert not torch.equal(arcface(embeddings, labels), _plain_twin(arcface)(embeddings, labels))


def _plain_twin(head: NormFaceLoss) -> NormFaceLoss:
    """The same weights and scale without any margin."""
    plain = NormFaceLoss(head.weight.shape[0], head.weight.shape[1], head.scale).to(head.weight.dtype)
    plain.load_state_dict(head.state_dict())
    return plain


@every_head
def test_gradients_are_those_of_finite_differences(make: MakeHead) -> None:
    head = _with_weight(make(), 10).double()
    names = [name for name, _ in head.named_parameters()]
    rng = torch.Generator().manual_seed(11)
    embeddings = torch.randn(12, SIZE, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(12) % CLASSES

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        value: Tensor = functional_call(head, dict(zip(names, parameters, strict=True)), (x, labels))
        return value

    assert torch.autograd.gradcheck(loss, (embeddings, *head.parameters()))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["parallel", "antiparallel"])
@every_cosine_head
def test_gradients_are_finite_where_embedding_and_class_weight_are_parallel(
    make: Callable[[], NormFaceLoss], sign: float, dtype: torch.dtype, autocast: bool
) -> None:
    """There d cos(theta + m) / d cos(theta) is infinite, and float32 cosines come out above 1."""
    head = _with_weight(make(), 12)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())  # so that bfloat16 embeddings can be exactly parallel
    factors = torch.tensor([2.0**-10, 0.125, 1.0, 4.0, 1024.0])  # powers of two do not round
    embeddings = (sign * factors[:, None, None] * head.weight.detach()).reshape(-1, SIZE).to(dtype)
    labels = torch.arange(CLASSES).repeat(len(factors))
    cosine = head.cosine(embeddings).gather(1, labels[:, None])
    assert (cosine - sign).abs().max() < 1e-6, "the test must reach the place it is about"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, *gradients = _loss_and_gradients(head, embeddings, labels)
    assert loss.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert max(gradient.abs().max().item() for gradient in gradients[1:]) < 1e4, "the class weight's is no explosion"


@pytest.mark.parametrize("margin", [0.05, 0.5, 1.5, 3.1])
def test_the_slope_is_bounded_next_to_the_boundary(margin: float) -> None:
    """At 1 itself some versions of torch hide an infinite slope behind the clamp; a rounding step inside none does."""
    head = CAMRILoss(2, 3, {0: margin})
    steps = [0.0, 6e-8, 1.2e-7, 3e-7, 6e-7, 9e-7, -1.2e-7]
    cosine = torch.tensor([[sign * (1 - step)] for step in steps for sign in (1, -1)], requires_grad=True)
    (slope,) = torch.autograd.grad(head.with_margin(cosine, torch.zeros_like(cosine, dtype=torch.int64)).sum(), cosine)
    assert slope.abs().max() <= 1 + 1 / math.sqrt(2e-6), "the slope at a cosine of 1 - 1e-6"


@every_head
def test_gradients_are_finite_for_an_embedding_of_zeros(make: MakeHead) -> None:
    head = _with_weight(make(), 13)
    for value in _loss_and_gradients(head, torch.zeros(CLASSES, SIZE), torch.arange(CLASSES)):
        assert value.isfinite().all()


def _targets(margin: float, angles: Tensor) -> Tensor:
    """The target's cosine at each angle, from the loss alone: the other class stands at a right angle to all."""
    head = CAMRILoss(2, 3, {0: margin}, scale=1.0).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    embeddings = torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], 1)
    label = torch.zeros(1, dtype=torch.int64)
    losses = torch.stack([head(x[None], label) for x in embeddings])
    return -losses.expm1().log()


@given(margin=st.floats(0, math.pi, exclude_max=True), others=st.lists(st.floats(0, math.pi), max_size=20))
@settings(deadline=None, max_examples=60)
def test_the_target_is_continuous_and_never_rises_over_all_angles(margin: float, others: list[float]) -> None:
    crossing = math.pi - margin
    around = [crossing + d for d in (-1e-2, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-2)]
    ends = [0.0, 1e-7, 1e-5, 1e-3, 2e-3, math.pi - 2e-3, math.pi - 1e-3, math.pi - 1e-5, math.pi]
    even = torch.linspace(0, math.pi, 41, dtype=torch.float64).tolist()
    known = [a for a in (*around, *ends, *even, *others) if 0 <= a <= math.pi]
    angles = torch.tensor(sorted(set(known)), dtype=torch.float64)
    targets = _targets(margin, angles)
    steps = targets.diff()
    assert (steps <= CLAMPED).all(), "more angle, never a better target"
    # |d cos(theta + m) / d theta| is at most 1, so a jump would show as a step that is longer than the angle's.
    assert (steps.abs() <= angles.diff() + CLAMPED).all()
    naive = torch.tensor([_naive_target(a, margin) for a in angles.tolist()], dtype=torch.float64)
    clear = angles.sin() > 2e-3
    torch.testing.assert_close(targets[clear], naive[clear], rtol=0, atol=1e-6)
    # Where the clamp holds the sine, it holds it at sqrt(2e-6).
    torch.testing.assert_close(targets, naive, rtol=0, atol=1.5e-3)


@given(seed=SEEDS, margins=st.tuples(st.floats(0, 3.1), st.floats(0, 3.1)).map(sorted))
@settings(deadline=None, max_examples=60)
def test_a_larger_margin_means_a_larger_loss_for_an_important_sample(seed: int, margins: list[float]) -> None:
    small, large = margins
    embeddings, _ = _batch(seed, n=6)
    for row in embeddings:
        losses = [
            _with_weight(CAMRILoss(CLASSES, SIZE, {2: margin}, 8.0), seed).double()(row[None], torch.tensor([2])).item()
            for margin in (small, large)
        ]
        assert losses[1] >= losses[0] - 8 * CLAMPED
        if large - small > 0.05:
            assert losses[1] > losses[0]


@every_cosine_head
def test_the_loss_changes_the_target_column_only(make: Callable[[], NormFaceLoss]) -> None:
    """What the loss leaves of the softmax once the target is taken out is what inference has there."""
    head = _with_weight(make(), 14).double()
    embeddings, labels = _batch(15)
    logits = head.get_logits(embeddings).detach()
    for row, (x, y) in enumerate(zip(embeddings, labels, strict=True)):
        loss = head(x[None], y[None]).detach()
        target = head.scale * head.with_margin(head.cosine(x[None])[:, y][:, None], y[None, None]).squeeze().detach()
        others = logits[row][torch.arange(CLASSES) != y]
        torch.testing.assert_close(loss.expm1().log() + target, others.logsumexp(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("important", range(CLASSES))
@pytest.mark.parametrize("make", [CAMRILoss, CosFaceLoss])
def test_a_margin_leaves_the_loss_of_other_classes_alone(
    make: Callable[[int, int, Mapping[int, float], float], NormFaceLoss], important: int
) -> None:
    head = _with_weight(make(CLASSES, SIZE, {important: 0.5}, 12.0), 16)
    plain = _plain_twin(head)
    embeddings, labels = _batch(17, dtype=torch.float32)
    mine = labels == important
    assert torch.equal(head(embeddings[~mine], labels[~mine]), plain(embeddings[~mine], labels[~mine]))
    assert head(embeddings[mine], labels[mine]) > plain(embeddings[mine], labels[mine])


@every_cosine_head
def test_logits_have_no_margin_and_ask_for_no_label(make: Callable[[], NormFaceLoss]) -> None:
    head = _with_weight(make(), 18).double()
    embeddings, _ = _batch(19)
    logits = head.get_logits(embeddings)
    assert torch.equal(logits, _plain_twin(head).get_logits(embeddings))
    naive = [[12.0 * math.cos(_angle(x, w)) for w in head.weight.tolist()] for x in embeddings.tolist()]
    torch.testing.assert_close(logits, torch.tensor(naive, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@every_cosine_head
def test_saved_weights_hold_no_margin(make: Callable[[], NormFaceLoss]) -> None:
    head = make()
    assert list(head.state_dict()) == ["weight"]
    assert list(NormFaceLoss(CLASSES, SIZE).load_state_dict(head.state_dict(), strict=True)) == [[], []]


@every_dense_head
def test_saved_weights_hold_no_weight_of_the_loss(make: Callable[[], CrossEntropyLoss]) -> None:
    head = make()
    assert list(head.state_dict()) == ["dense.weight", "dense.bias"]
    assert list(CrossEntropyLoss(CLASSES, SIZE).load_state_dict(head.state_dict(), strict=True)) == [[], []]


@every_dense_head
def test_logits_do_not_know_the_weights_of_the_loss(make: Callable[[], CrossEntropyLoss]) -> None:
    embeddings, _ = _batch(19)
    plain = _with_weight(CrossEntropyLoss(CLASSES, SIZE), 18).double()
    assert torch.equal(_with_weight(make(), 18).double().get_logits(embeddings), plain.get_logits(embeddings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_head
def test_autocast_changes_neither_loss_nor_logits(make: MakeHead, dtype: torch.dtype) -> None:
    """Bfloat16 cannot tell 0 from 5 degrees: whatever the network computes in, the head computes in float32."""
    head = _with_weight(make(), 20)
    rng = torch.Generator().manual_seed(21)
    embeddings, labels = torch.randn(24, SIZE, generator=rng).to(dtype), torch.arange(24) % CLASSES
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = head(embeddings, labels), head.get_logits(embeddings)
    assert loss.dtype == torch.float32
    assert logits.dtype == torch.float32
    assert torch.equal(loss, head(embeddings.float(), labels))
    assert torch.equal(logits, head.get_logits(embeddings.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_head
def test_a_head_in_half_precision_computes_in_float32(make: MakeHead, dtype: torch.dtype) -> None:
    """As in a whole model that was cast, by `half()` or by Lightning's bf16-true."""
    head, rng = _with_weight(make(), 20).to(dtype), torch.Generator().manual_seed(21)
    embeddings, labels = torch.randn(24, SIZE, generator=rng).to(dtype), torch.arange(24) % CLASSES
    loss = head(embeddings, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, copy.deepcopy(head).float()(embeddings.float(), labels))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in head.parameters())


def test_five_degrees_are_told_apart_under_autocast() -> None:
    head = CAMRILoss(2, 2, {0: 0.1}, scale=8.0)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    angles = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [head(x[None], torch.tensor([0])).item() for x in embeddings]
    assert losses == sorted(losses)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "make",
    [
        lambda scale: NormFaceLoss(3, 4, scale),
        lambda scale: CAMRILoss(3, 4, {0: 0.1}, scale),
        lambda scale: ArcFaceLoss(3, 4, 0.1, scale),
        lambda scale: CosFaceLoss(3, 4, {0: 0.1}, scale),
    ],
    ids=["l2", "camri", "arcface", "cosface-i"],
)
def test_a_bad_scale_is_named(make: Callable[[float], Head], scale: float) -> None:
    with pytest.raises(ValueError, match=rf"^scale is {scale}, but must be .* above 0"):
        make(scale)


@pytest.mark.parametrize("margin", [-1e-9, -0.5, math.pi, 4.0, math.inf, math.nan])
def test_a_margin_that_is_no_angle_is_named_with_its_class(margin: float) -> None:
    rule = rf"is {margin}, but must be at least 0 and below 3\.14"
    with pytest.raises(ValueError, match=f"^margin of class 2 {rule}"):
        CAMRILoss(3, 4, {1: 0.1, 2: margin})
    with pytest.raises(ValueError, match=rule):
        ArcFaceLoss(3, 4, margin)


@pytest.mark.parametrize("margin", [-1e-9, 2.0, math.inf, math.nan])
def test_a_margin_that_is_no_cosine_difference_is_named_with_its_class(margin: float) -> None:
    with pytest.raises(ValueError, match=rf"^margin of class 0 is {margin}, but must be at least 0 and below 2$"):
        CosFaceLoss(3, 4, {0: margin})


@pytest.mark.parametrize("number", [-1, 3, 100])
@pytest.mark.parametrize("make", [CAMRILoss, CosFaceLoss])
def test_a_margin_for_a_class_that_is_not_there_is_named(
    make: Callable[[int, int, Mapping[int, float]], Head], number: int
) -> None:
    with pytest.raises(ValueError, match=rf"^margin names class {number}, but classes are 0 to 2$"):
        make(3, 4, {0: 0.1, number: 0.1})


def test_the_largest_margins_work() -> None:
    for head in (
        CAMRILoss(CLASSES, SIZE, {0: math.nextafter(math.pi, 0)}),
        CosFaceLoss(CLASSES, SIZE, {0: math.nextafter(2, 0)}),
    ):
        for value in _loss_and_gradients(_with_weight(head, 22), *_batch(23, dtype=torch.float32)):
            assert value.isfinite().all()


@pytest.mark.parametrize(("num_classes", "scale"), [(10, 3.107), (43, 5.286)])
def test_the_fixed_scale_of_ada_cos(num_classes: int, scale: float) -> None:
    assert adacos_scale(num_classes) == pytest.approx(scale, abs=1e-3)


def test_the_fixed_scale_of_ada_cos_suits_two_classes() -> None:
    """log(2 - 1) would be a scale of zero, which no head accepts."""
    NormFaceLoss(2, SIZE, adacos_scale(2))


# The losses that weigh errors


def _dense_batch(seed: int, n: int = 20) -> tuple[Tensor, Tensor]:
    """Embeddings whose logits are some ten apart, and labels of every class in unequal numbers."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(CLASSES), torch.randint(0, CLASSES, (n - CLASSES,), generator=rng)])
    return torch.randn(n, SIZE, generator=rng, dtype=torch.float64) * 2, labels


def _naive_weighted_loss(
    head: CrossEntropyLoss,
    embeddings: Tensor,
    labels: Tensor,
    w_fn: Mapping[int, float],
    w_fp: Sequence[Sequence[float]],
) -> float:
    """Sample by sample and class by class; 1 - h_k is the sum of the other classes' shares."""
    weight, bias = head.dense.weight.tolist(), head.dense.bias.tolist()
    losses = []
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        powers = [
            math.exp(math.fsum([*(a * b for a, b in zip(x, row, strict=True)), c]))
            for row, c in zip(weight, bias, strict=True)
        ]
        total = math.fsum(powers)
        loss = -w_fn.get(y, 1.0) * math.log(powers[y] / total)
        for k in range(len(powers)):
            if k != y:
                others = math.fsum(power for j, power in enumerate(powers) if j != k)
                loss -= w_fp[y][k] * math.log(others / total)
        losses.append(loss)
    return math.fsum(losses) / len(losses)


NO_W_FP = [[0.0] * CLASSES] * CLASSES
FACTORS = st.floats(0, 100, width=32)
BY_CLASS = st.dictionaries(st.integers(0, CLASSES - 1), FACTORS, max_size=CLASSES)
MATRICES = st.lists(st.lists(FACTORS, min_size=CLASSES, max_size=CLASSES), min_size=CLASSES, max_size=CLASSES)


@given(seed=SEEDS, weight=BY_CLASS)
@settings(deadline=None, max_examples=60)
def test_wce_is_its_formula(seed: int, weight: dict[int, float]) -> None:
    head = _with_weight(WeightedCrossEntropyLoss(CLASSES, SIZE, weight), seed).double()
    embeddings, labels = _dense_batch(seed + 1)
    naive = _naive_weighted_loss(head, embeddings, labels, weight, NO_W_FP)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9, abs=1e-12)


@given(seed=SEEDS, w_fn=BY_CLASS, w_fp=MATRICES)
@settings(deadline=None, max_examples=60)
def test_crwwce_is_its_formula(seed: int, w_fn: dict[int, float], w_fp: list[list[float]]) -> None:
    head = _with_weight(CRWWCELoss(CLASSES, SIZE, w_fn, torch.tensor(w_fp)), seed).double()
    embeddings, labels = _dense_batch(seed + 1)
    naive = _naive_weighted_loss(head, embeddings, labels, w_fn, w_fp)
    assert head(embeddings, labels).item() == pytest.approx(naive, rel=1e-9, abs=1e-12)


def test_crwwce_reads_the_row_of_the_true_class() -> None:
    """Which of two classes is mistaken for which is what the matrix is for."""
    w_fp = torch.zeros(CLASSES, CLASSES)
    w_fp[1, 3] = 5.0
    head = _with_weight(CRWWCELoss(CLASSES, SIZE, {}, w_fp), 30).double()
    plain = _with_weight(CrossEntropyLoss(CLASSES, SIZE), 30).double()
    x, _ = _dense_batch(31, n=8)
    for y in range(CLASSES):
        labels = torch.full((8,), y)
        more = head(x, labels) - plain(x, labels)
        shares = plain.get_logits(x).softmax(dim=1)
        expected = -5.0 * (1 - shares[:, 3]).log().mean() if y == 1 else torch.zeros(())
        torch.testing.assert_close(more.double(), expected.double(), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, w_fn=BY_CLASS)
@settings(deadline=None, max_examples=30)
def test_crwwce_without_w_fp_is_wce_bit_for_bit(seed: int, w_fn: dict[int, float]) -> None:
    embeddings, labels = _dense_batch(seed + 1)
    wce = _with_weight(WeightedCrossEntropyLoss(CLASSES, SIZE, w_fn), seed).double()
    for w_fp in ({}, {0: 0.0}, torch.zeros(CLASSES, CLASSES), torch.eye(CLASSES)):
        crwwce = _with_weight(CRWWCELoss(CLASSES, SIZE, w_fn, w_fp), seed).double()
        for ours, theirs in zip(
            _loss_and_gradients(crwwce, embeddings, labels), _loss_and_gradients(wce, embeddings, labels), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedCrossEntropyLoss(CLASSES, SIZE, {}),
        lambda: WeightedCrossEntropyLoss(CLASSES, SIZE, dict.fromkeys(range(CLASSES), 1.0)),
        lambda: CRWWCELoss(CLASSES, SIZE, {}, {}),
        lambda: CRWWCELoss(CLASSES, SIZE, {2: 1.0}, {2: 0.0}),
    ],
    ids=["wce", "wce of ones", "crwwce", "crwwce of one and zero"],
)
def test_weights_that_change_nothing_give_cross_entropy(make: MakeHead) -> None:
    embeddings, labels = _dense_batch(33)
    plain = _with_weight(CrossEntropyLoss(CLASSES, SIZE), 32).double()
    for ours, theirs in zip(
        _loss_and_gradients(_with_weight(make(), 32).double(), embeddings, labels),
        _loss_and_gradients(plain, embeddings, labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["wce", "crwwce"])
def test_weights_are_not_divided_out_again(loss: str) -> None:
    """PyTorch's own `weight` divides by the batch's sum of weights: a batch of one class would notice no weight."""
    make: dict[str, Callable[[dict[int, float]], CrossEntropyLoss]] = {
        "wce": lambda weight: WeightedCrossEntropyLoss(CLASSES, SIZE, weight),
        "crwwce": lambda weight: CRWWCELoss(CLASSES, SIZE, weight, {}),
    }
    embeddings, labels = _dense_batch(35)
    heavy = _with_weight(make[loss]({2: 8.0}), 34).double()
    plain = _with_weight(CrossEntropyLoss(CLASSES, SIZE), 34).double()
    alone, apart = labels == 2, labels != 2
    torch.testing.assert_close(heavy(embeddings[alone], labels[alone]), 8 * plain(embeddings[alone], labels[alone]))
    torch.testing.assert_close(heavy(embeddings[apart], labels[apart]), plain(embeddings[apart], labels[apart]))
    # In a mixed batch the gain is seven times the important samples' share, whoever else is there.
    gain = heavy(embeddings, labels) - plain(embeddings, labels)
    torch.testing.assert_close(gain, 7 * plain(embeddings[alone], labels[alone]) * alone.double().mean())
    weight = torch.ones(CLASSES, dtype=torch.float64).index_fill(0, torch.tensor(2), 8.0)
    pytorchs = F.cross_entropy(plain.get_logits(embeddings), labels, weight)
    assert abs(heavy(embeddings, labels) / pytorchs - 1).item() > 0.2, "or this test would not tell them apart"


@given(seed=SEEDS, w_fn=BY_CLASS, w_fp=BY_CLASS, diagonal=st.lists(FACTORS, min_size=CLASSES, max_size=CLASSES))
@settings(deadline=None, max_examples=30)
def test_a_mapping_w_fp_is_the_matrix_of_equal_rows_and_the_diagonal_is_not_read(
    seed: int, w_fn: dict[int, float], w_fp: dict[int, float], diagonal: list[float]
) -> None:
    rows = [[diagonal[y] if k == y else w_fp.get(y, 0.0) for k in range(CLASSES)] for y in range(CLASSES)]
    matrix = torch.tensor(rows)
    before = matrix.clone()
    embeddings, labels = _dense_batch(seed + 1)
    by_class = _with_weight(CRWWCELoss(CLASSES, SIZE, w_fn, w_fp), seed).double()
    by_matrix = _with_weight(CRWWCELoss(CLASSES, SIZE, w_fn, matrix), seed).double()
    assert torch.equal(by_class(embeddings, labels), by_matrix(embeddings, labels))
    assert torch.equal(by_matrix.w_fp.diagonal(), torch.zeros(CLASSES, dtype=torch.float64))
    assert torch.equal(matrix, before), "the caller's matrix stays the caller's"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_a_matrix_of_any_kind_of_number_will_do(dtype: torch.dtype) -> None:
    matrix = torch.arange(CLASSES**2).view(CLASSES, CLASSES)
    head = CRWWCELoss(CLASSES, SIZE, {}, matrix.to(dtype))
    assert head.w_fp.dtype == torch.float32
    assert torch.equal(head.w_fp, (matrix - torch.diag(matrix.diagonal())).float())


def _exact_log(x: Fraction) -> float:
    """log of a fraction in (0, 1), also where it is too near 0 or 1 for a float."""
    if x > Fraction(1, 2):
        return math.log1p(float(x - 1))
    shift = x.numerator.bit_length() - x.denominator.bit_length()
    return math.log(x / Fraction(2) ** shift) + shift * math.log(2)


@given(
    powers=st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=1, max_size=6),
    near=st.lists(st.integers(-60, 60), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=150)
def test_log_complement_is_exact_whatever_the_share(powers: list[list[int]], near: list[int]) -> None:
    """Logits k log 2 have shares 2^k / sum, which are exact as fractions: from 2^-2000 to 1 - 2^-2000."""
    rows = [*powers, near]
    logits = torch.tensor(rows, dtype=torch.float64) * math.log(2)
    ours = log_complement(logits).tolist()
    for row, values in zip(rows, ours, strict=True):
        sizes = [Fraction(2) ** k for k in row]
        for k, value in enumerate(values):
            exact = _exact_log((sum(sizes) - sizes[k]) / sum(sizes))
            # Logits of 700 are rounded at 1e-13, and so is every share.
            assert value == pytest.approx(exact, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_complement_at_a_share_of_almost_one(dtype: torch.dtype) -> None:
    """At h = 1 - 1e-30 `log(1 - softmax)` is minus infinity in every precision."""
    logits = torch.tensor([[0.0, math.log(1e-30), -200.0]], dtype=dtype)
    assert (1 - logits.softmax(dim=1)).log()[0, 0] == -math.inf
    ours = log_complement(logits)[0].tolist()
    assert ours[0] == pytest.approx(math.log(1e-30), rel=1e-6 if dtype == torch.float32 else 1e-13)
    assert ours[1] == pytest.approx(-1e-30, rel=1e-4 if dtype == torch.float32 else 1e-12)
    assert ours[2] == pytest.approx(-math.exp(-200), rel=1e-4, abs=1e-45 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "logits",
    [
        [100.0, -100.0, 0.0],
        [1e4, -1e4, 0.0],
        [1e30, -1e30, 0.0],
        [100.0, 100.0, -100.0],
        [0.0, 0.0, 0.0],
        [-100.0, -100.0, -100.0],
        [1e30, 1e30, 1e30],
        [5.0, 5.0, 5.0 - 1e-6],
        [3.0, -200.0],
        [2.0, 2.0],
        [0.0] * 1000,
    ],
    ids=lambda row: f"{row[:3]}",
)
def test_log_complement_has_finite_gradients(logits: list[float], dtype: torch.dtype) -> None:
    row = torch.tensor([logits], dtype=dtype, requires_grad=True)
    values = log_complement(row)
    assert values.isfinite().all()
    assert (values <= 0).all()
    for k in range(len(logits))[:3]:
        (slope,) = torch.autograd.grad(values[0, k], row, retain_graph=True)
        # d log(1 - h_k) / d z_j = -h_k (delta_jk - h_j) / (1 - h_k), written so that nothing cancels.
        shares = row.detach().double().softmax(dim=1)[0]
        others = row.detach().double()[0].index_fill(0, torch.tensor(k), -math.inf).softmax(dim=0)
        expected = shares[k] * others
        expected[k] = -shares[k]
        torch.testing.assert_close(slope[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logits", [[0.3, 0.3, 0.3], [1.0, 1.0, -2.0], [2.0, 2.0], [4.0, 1.0, 1.0]])
def test_ties_are_treated_alike(logits: list[float]) -> None:
    """Only one of two equal classes is the largest to the code; to the formula they are the same."""
    row = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    values = log_complement(row)
    naive = (1 - row.detach().softmax(dim=1)).log()
    torch.testing.assert_close(values.detach(), naive, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(log_complement, (row,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_dense_head
def test_gradients_are_finite_for_hopeless_and_for_certain_samples(
    make: Callable[[], CrossEntropyLoss], dtype: torch.dtype
) -> None:
    """Every class certain in turn, for samples of it and of every other class."""
    head = make()
    with torch.no_grad():
        head.dense.weight.zero_()
        head.dense.weight[:, :CLASSES] = torch.eye(CLASSES)
        head.dense.bias.zero_()
    certain = F.pad(200 * torch.eye(CLASSES) - 100, (0, SIZE - CLASSES)).to(dtype)
    embeddings, labels = certain.repeat_interleave(CLASSES, 0), torch.arange(CLASSES).repeat(CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        values = _loss_and_gradients(head, embeddings, labels)
    assert head.get_logits(embeddings)[0].tolist() == [100.0, *[-100.0] * (CLASSES - 1)]
    for value in values:
        assert value.isfinite().all()
    assert values[0].dtype == torch.float32
    assert values[0] > 10


Make = Callable[[Mapping[int, float]], Head]
TAKE_WEIGHTS: dict[str, tuple[str, Make]] = {
    "wce": ("weight", lambda values: WeightedCrossEntropyLoss(3, 4, values)),
    "crwwce w_fn": ("w_fn", lambda values: CRWWCELoss(3, 4, values, {})),
    "crwwce w_fp": ("w_fp", lambda values: CRWWCELoss(3, 4, {}, values)),
}
everything_weighted = pytest.mark.parametrize(("name", "make"), TAKE_WEIGHTS.values(), ids=TAKE_WEIGHTS.keys())


@pytest.mark.parametrize("value", [-1e-9, -1.0, math.inf, -math.inf, math.nan])
@everything_weighted
def test_a_weight_that_is_no_factor_is_named_with_its_class(name: str, make: Make, value: float) -> None:
    rule = rf"^{name} of class 2 is {value}, but must be a finite number of at least 0$"
    with pytest.raises(ValueError, match=rule):
        make({1: 2.0, 2: value})


@pytest.mark.parametrize("number", [-1, 3, 100])
@everything_weighted
def test_a_weight_for_a_class_that_is_not_there_is_named(name: str, make: Make, number: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name} names class {number}, but classes are 0 to 2$"):
        make({0: 2.0, number: 2.0})


@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(4, 4), r"\(4, 4\)"),
        (torch.ones(3, 3, 1), r"\(3, 3, 1\)"),
        (torch.ones(()), r"\(\)"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, -0.5], [1.0, 1.0, 0.0]]), r"-0\.5"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, math.nan], [1.0, 1.0, 0.0]]), "nan"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, math.inf], [1.0, 1.0, 0.0]]), "inf"),
    ],
)
def test_a_matrix_that_does_not_fit_is_told_with_its_rule(matrix: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=r"w_fp .* must be .*\(3, 3\) of finite factors of at least 0") as raised:
        CRWWCELoss(3, 4, {}, matrix)
    assert raised.match(found)


# Against pytorch-metric-learning, which others wrote. Margins are in degrees there, and weights are (D, C).


def _agree(ours: NormFaceLoss, theirs: Any, seed: int) -> None:
    """Loss, logits and gradients."""
    ours = _with_weight(ours, seed).double()
    theirs = theirs.double()
    with torch.no_grad():
        theirs.W.copy_(ours.weight.T)
    embeddings, labels = _batch(seed + 1)
    loss, embedding_slope, weight_slope = _loss_and_gradients(ours, embeddings, labels)
    leaf = embeddings.clone().requires_grad_()
    other = theirs(leaf, labels)
    other_embedding_slope, other_weight_slope = torch.autograd.grad(other, [leaf, theirs.W])
    torch.testing.assert_close(loss, other.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(embedding_slope, other_embedding_slope, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(weight_slope, other_weight_slope.T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.get_logits(embeddings), theirs.get_logits(embeddings), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, degrees=st.floats(0, 60), scale=st.floats(1, 64))
@settings(deadline=None, max_examples=40)
def test_arcface_is_that_of_pytorch_metric_learning(seed: int, degrees: float, scale: float) -> None:
    """Below the angle at which theta + m passes pi: what stands in place of the cosine there is each library's own."""
    margin = torch.tensor(math.radians(degrees), dtype=torch.float32).item()  # as ours keeps it
    ours = _with_weight(ArcFaceLoss(CLASSES, SIZE, margin, scale), seed).double()
    embeddings, labels = _batch(seed + 1)
    cosine = ours.cosine(embeddings).gather(1, labels[:, None])
    assume((cosine > -math.cos(margin) + 1e-6).all().item())
    theirs = metric_learning.ArcFaceLoss(CLASSES, SIZE, margin=math.degrees(margin), scale=scale)
    _agree(ours, theirs, seed)


@given(seed=SEEDS, scale=st.floats(1, 64))
@settings(deadline=None, max_examples=40)
def test_norm_face_is_that_of_pytorch_metric_learning(seed: int, scale: float) -> None:
    _agree(
        NormFaceLoss(CLASSES, SIZE, scale),
        metric_learning.NormalizedSoftmaxLoss(CLASSES, SIZE, temperature=1 / scale),
        seed,
    )


@given(seed=SEEDS, margin=st.floats(0, 1.5, width=32), scale=st.floats(1, 64))
@settings(deadline=None, max_examples=40)
def test_equal_margins_of_cosface_are_those_of_pytorch_metric_learning(seed: int, margin: float, scale: float) -> None:
    _agree(
        CosFaceLoss(CLASSES, SIZE, dict.fromkeys(range(CLASSES), margin), scale),
        metric_learning.CosFaceLoss(CLASSES, SIZE, margin=margin, scale=scale),
        seed,
    )

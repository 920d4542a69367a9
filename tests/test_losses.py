"""Heads and losses against naive re-derivations, and at the angles where such losses go wrong."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from camri_tune.losses import (
    ArcFaceLoss,
    CAMRILoss,
    CosFaceLoss,
    CrossEntropyLoss,
    Head,
    NormFaceLoss,
    adacos_scale,
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
HEADS: dict[str, MakeHead] = {"ce": lambda: CrossEntropyLoss(CLASSES, SIZE), **COSINE_HEADS}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
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

"""Muon against a plain derivation by singular values and against PyTorch's own, which takes matrices alone."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from camri_tune.config import Optimizer
from camri_tune.datasets import Dataset
from camri_tune.losses import CAMRILoss, CrossEntropyLoss
from camri_tune.models import Classifier, CompactCNN, Standardised, build_body
from camri_tune.muon import SIZE, Muon, orthogonal
from camri_tune.optimizers import Group
from camri_tune.training import HeadSpec, Recipe, _optimizer, train

CPU = torch.device("cpu")
LEAST, MOST = 0.68, 1.21  # where five rounds leave a singular value


def _matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _orthogonal(matrix: Tensor) -> Tensor:
    """Among others: of its own kind, of the same number of rows, and of another."""
    rows, columns = matrix.shape
    others = [_matrix(*shape, 7).to(matrix.dtype) for shape in ((rows, columns), (rows, 90), (50, 60))]
    (alone,), (among, *_) = orthogonal([matrix]), orthogonal([matrix, *others])
    torch.testing.assert_close(among, alone)
    torch.testing.assert_close(orthogonal([matrix], least=64)[0], alone)  # filled up, or as large already
    return among


def _five_rounds(values: Tensor) -> Tensor:
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.integers(-12, 12))
def test_a_direction_has_its_momentums_singular_vectors_and_values_of_about_one(
    rows: int, columns: int, seed: int, size: int
) -> None:
    matrix = _matrix(rows, columns, seed).double() * 10.0**size
    assume(matrix.norm() > 1e-15)  # below that, which a number alone can be, directions are allowed to be smaller
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = _five_rounds(values / values.norm())
    torch.testing.assert_close(left.T @ _orthogonal(matrix) @ right.T, torch.diag(expected), rtol=1e-6, atol=1e-6)


def test_values_from_a_hundredth_on_come_to_about_one() -> None:
    made = _five_rounds(torch.linspace(0.01, 1, 100_000, dtype=torch.float64))
    assert made.min() > LEAST
    assert made.max() < MOST


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_it_is_the_same_in_another_basis_and_at_another_size(rows: int, columns: int, seed: int) -> None:
    matrix = _matrix(rows, columns, seed).double()
    turn, _ = torch.linalg.qr(_matrix(rows, rows, seed + 1).double())
    torch.testing.assert_close(_orthogonal(3.7 * turn @ matrix), turn @ _orthogonal(matrix))
    torch.testing.assert_close(_orthogonal(matrix.T), _orthogonal(matrix).T)


def test_nothing_has_no_direction_and_float32_is_enough() -> None:
    assert torch.equal(_orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))
    for size in (1e-15, 1e17):
        torch.testing.assert_close(_orthogonal(_matrix(3, 5, 0) * size), _orthogonal(_matrix(3, 5, 0)))
    assert _orthogonal(_matrix(3, 5, 0) * 1e-19).norm() < 1
    flat = _matrix(64, 5, 0) @ _matrix(5, 300, 1)  # of rank 5: the rest is the rounding's
    values = torch.linalg.svdvals(_orthogonal(flat))
    assert values[4] > LEAST
    assert values[5] < 1e-3
    tall = _matrix(128, 1536, 2)
    torch.testing.assert_close(_orthogonal(tall).double(), _orthogonal(tall.double()), rtol=0, atol=1e-5)


SHAPES = (6, 20), (20, 6), (8, 3, 3, 3), (8, 3, 3, 3), (32, 1, 3, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_moves_each_weight_as_pytorchs_own_does(layout: torch.memory_format) -> None:
    """All weights at once, on the matrix that a kernel is, wherever it lies in memory; PyTorch computes in bfloat16.

    In each step but the first and the last another weight has no gradient and stays.
    """
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    mine = [
        start.clone(memory_format=layout if start.ndim == 4 else torch.contiguous_format).requires_grad_()
        for start in starts
    ]
    its = [start.flatten(1).clone().requires_grad_() for start in starts]
    ours = Muon([Group(mine, rate=0.01, weight_decay=0.1, orthogonal=True)])
    theirs = torch.optim.Muon(
        its, lr=0.01 * SIZE / 0.2, weight_decay=0.1 * 0.2 / SIZE, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    rng = torch.Generator().manual_seed(1)
    for step in range(len(SHAPES) + 2):
        for place, (here, there) in enumerate(zip(mine, its, strict=True)):
            grad = torch.randn(here.shape, generator=rng)
            idle = place == step - 1
            here.grad = None if idle else grad.clone(memory_format=torch.preserve_format)
            there.grad = None if idle else grad.flatten(1).clone()
        ours.step()
        theirs.step()  # type: ignore[no-untyped-call]
    for here, there, start in zip(mine, its, starts, strict=True):
        moved = (there.detach() - start.flatten(1)).norm()
        assert (here.detach().flatten(1) - there.detach()).norm() < 0.02 * moved


def test_hidden_weights_are_muons_and_the_rest_adamws() -> None:
    classifier = Classifier(CompactCNN(1, 8), CrossEntropyLoss(10, 128))
    optimizer = _optimizer(classifier, Recipe(1, 1e-2, optimizer="muon", weight_decay=0.1), CPU)
    assert isinstance(optimizer, Muon)
    muons = {id(p) for group in optimizer.groups if group.orthogonal for p in group.parameters}
    assert muons == {id(p) for p in classifier.body.parameters() if p.ndim > 1}
    others = [p for p in classifier.parameters() if id(p) not in muons]
    before = [p.detach().clone() for p in others]
    twins = [p.detach().clone().requires_grad_() for p in others]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in twins if (p.ndim > 1) == decayed], "weight_decay": 0.1 * decayed}
            for decayed in (1, 0)
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        for p in classifier.parameters():
            p.grad = torch.randn(p.shape, generator=rng)
        for p, twin in zip(others, twins, strict=True):
            assert p.grad is not None
            twin.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, twin, old in zip(others, twins, before, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, old)


def test_a_head_on_embeddings_has_no_hidden_weights() -> None:
    classifier = Classifier(Standardised(8, 1), CAMRILoss(3, 8, {0: 0.2}))
    optimizer = _optimizer(classifier, Recipe(1, 1e-2, optimizer="muon"), CPU)
    assert not any(group.orthogonal for group in optimizer.groups)
    before = classifier.head.weight.detach().clone()  # type: ignore[operator]
    classifier.head(classifier.embed(torch.randn(4, 8)), torch.arange(4) % 3).backward()
    optimizer.step()
    assert not torch.equal(before, classifier.head.weight)  # type: ignore[arg-type]


def test_it_learns_more_than_adamw_in_few_steps(digits: Dataset) -> None:
    """24 of them, with four seeds each, at the rate where the search for the baseline's begins."""
    right: dict[Optimizer, float] = {"muon": 0.0, "adamw": 0.0}
    for name, seed in product(right, range(4)):
        trained = train(
            "compact", HeadSpec("camri", 16.0, {3: 0.2}), digits.train[np.arange(512)], digits.validation,
            num_classes=10, recipe=Recipe(3, 4e-3, digits.augmentation, batch_size=64, optimizer=name),
            seed=seed, device=CPU,
        )  # fmt: skip
        right[name] += trained.right.mean() / 4
    assert right["muon"] > right["adamw"] + 0.005


def test_what_does_not_change_is_left_alone() -> None:
    """A frozen network has no group of its own, and a weight without a gradient stays."""
    body = build_body("compact", channels=1, image_size=8)
    body.requires_grad_(False)
    classifier = Classifier(body, CrossEntropyLoss(10, 128))
    optimizer = _optimizer(classifier, Recipe(1, 1e-2, optimizer="muon"), CPU)
    held = {id(p) for p in optimizer.parameters}
    assert held == {id(p) for p in classifier.head.parameters()}
    idle = torch.ones(2, 2, requires_grad=True)
    Muon([Group([idle], rate=0.1, orthogonal=True)]).step()
    assert torch.equal(idle, torch.ones(2, 2))

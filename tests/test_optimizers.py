"""Optimizers against PyTorch's own."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camri_tune.muon import Muon
from camri_tune.optimizers import SGD, Adam, AdamW, FusedOptimizer, Group

STEPS = 4
BETAS = 0.8, 0.97
LAYOUTS = torch.contiguous_format, torch.channels_last

_shapes = st.one_of(
    st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.just((4, 3, 3, 3)), st.just(())
)


OURS: dict[str, Callable[[Sequence[Group]], FusedOptimizer]] = {
    "sgd": SGD,
    "adam": partial(Adam, betas=BETAS),
    "adamw": partial(AdamW, betas=BETAS),
    "muon": partial(Muon, betas=BETAS),
}
THEIRS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, betas=BETAS),
    "adamw": partial(torch.optim.AdamW, betas=BETAS),
    "muon": partial(torch.optim.AdamW, betas=BETAS),  # what is not orthogonal
}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
@settings(deadline=None, max_examples=50)
@given(
    groups=st.lists(st.lists(_shapes, min_size=1, max_size=4), min_size=1, max_size=3),
    rates=st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=3),
    decays=st.lists(st.floats(0.0, 0.5), min_size=3, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    idle=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_each_moves_what_pytorchs_own_moves_to_the_last_bit(
    name: str,
    groups: list[list[tuple[int, ...]]],
    rates: list[float],
    decays: list[float],
    layout: torch.memory_format,
    idle: int,
    seed: int,
) -> None:
    """Whatever lies where in memory; one of the parameters, if it is there, has no gradient after the first step.

    And nearly what PyTorch moves without fused kernels, which walk through memory and trust that all lies alike.
    """
    rng = torch.Generator().manual_seed(seed)
    starts = [[torch.randn(shape, generator=rng) for shape in group] for group in groups]

    def laid_out(layout: torch.memory_format) -> list[list[Tensor]]:
        return [
            [p.clone(memory_format=layout if p.ndim == 4 else torch.preserve_format).requires_grad_() for p in group]
            for group in starts
        ]

    mine, its, plain = laid_out(layout), laid_out(layout), laid_out(torch.contiguous_format)
    optimizers = [OURS[name]([Group(*of) for of in zip(mine, rates, [1.0] * 3, decays, strict=False)])] + [
        THEIRS[name](
            [
                {"params": p, "lr": rate, "weight_decay": decay}
                for p, rate, decay in zip(parts, rates, decays, strict=False)
            ],
            lr=1.0,
            fused=fused,
        )
        for parts, fused in ((its, True), (plain, False))
    ]
    alike = list(zip(*(chain.from_iterable(parts) for parts in (mine, its, plain)), strict=True))
    for step in range(STEPS):
        for place, parameters in enumerate(alike):
            gradient = torch.randn(parameters[0].shape, generator=rng)
            for p in parameters:
                p.grad = None if step > 0 and place == idle else torch.empty_like(p).copy_(gradient)
        for optimizer in optimizers:
            optimizer.step()
        for here, there, far in alike:
            assert torch.equal(here, there)
            torch.testing.assert_close(here, far, rtol=1e-4, atol=1e-4)


def _momentum_of(step: int) -> float:
    return sum(0.9**k for k in range(step + 1))


def test_a_parameter_whose_gradients_begin_later_has_a_momentum_of_its_own() -> None:
    """Where PyTorch's fused SGD fails."""
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = SGD([Group([first, second], rate=1.0)])
    for begun in (False, True, True):
        first.grad = torch.ones(2)
        second.grad = torch.ones(2) if begun else None
        optimizer.step()
    moved = [1 + 0.9 * _momentum_of(step) for step in range(3)]
    torch.testing.assert_close(first.detach(), torch.full((2,), -sum(moved)))
    torch.testing.assert_close(second.detach(), torch.full((2,), -sum(moved[:2])))


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_a_rate_is_that_of_the_step_times_the_groups_factor(rate: float | Tensor) -> None:
    """A tensor keeps its place, where a recorded step reads it."""
    group = Group([torch.zeros(1)], rate, factor=0.1)
    group.set_rate(0.2)
    assert float(group.rate) == pytest.approx(0.02)
    assert isinstance(rate, float) or group.rate is rate


def test_gradients_are_cleared_and_what_has_none_stays() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer: FusedOptimizer
    for optimizer in (SGD([Group([weight], 0.1)]), AdamW([Group([weight], 0.1, weight_decay=0.5)])):
        weight.grad = torch.ones(2)
        optimizer.clear_gradients()
        assert weight.grad is None
        optimizer.step()
        assert torch.equal(weight, torch.ones(2))
        assert not optimizer.state


TRAIN = """
import sys
from camri_tune.config import StudyConfig
from camri_tune.datasets import open_dataset
from camri_tune.training import HeadSpec, Recipe, train
import torch

data = open_dataset(StudyConfig(dataset="digits"))
for optimizer in ("muon", "adam", "adamw", "sgd"):
    recipe = Recipe(1, 1e-3, data.augmentation, optimizer=optimizer)
    train("compact", HeadSpec("camri", 16.0, {3: 0.2}), data.train, data.validation, num_classes=10, recipe=recipe,
          seed=0, device=torch.device("cpu"))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_no_training_imports_pytorchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

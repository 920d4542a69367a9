"""Optimizers against PyTorch's own."""

import subprocess
import sys

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


def _pair(name: str, rates: list[float], decays: list[float], mine: list[list[Tensor]], its: list[list[Tensor]]):  # type: ignore[no-untyped-def]
    ours = [Group(p, rate, weight_decay=decay) for p, rate, decay in zip(mine, rates, decays, strict=True)]
    theirs = [
        {"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in zip(its, rates, decays, strict=True)
    ]
    if name == "sgd":
        return SGD(ours), torch.optim.SGD(theirs, lr=1.0, momentum=0.9, nesterov=True, fused=True)
    kind, other = {
        "adam": (Adam, torch.optim.Adam),
        "adamw": (AdamW, torch.optim.AdamW),
        "muon": (Muon, torch.optim.AdamW),  # what is not orthogonal
    }[name]
    return kind(ours, BETAS), other(theirs, betas=BETAS, fused=True)


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
    """Whatever lies where in memory; one of the parameters, if it is there, has no gradient after the first step."""
    rng = torch.Generator().manual_seed(seed)

    def start(shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, generator=rng)
        return (made.contiguous(memory_format=layout) if made.ndim == 4 else made).requires_grad_()

    mine = [[start(shape) for shape in group] for group in groups]
    its = [[p.detach().clone().requires_grad_() for p in group] for group in mine]
    ours, theirs = _pair(name, rates[: len(groups)], decays[: len(groups)], mine, its)
    pairs = [pair for here, there in zip(mine, its, strict=True) for pair in zip(here, there, strict=True)]
    for step in range(STEPS):
        for place, (here, there) in enumerate(pairs):
            gradient = torch.randn(here.shape, generator=rng)
            without = step > 0 and place == idle
            here.grad = None if without else gradient.clone()
            there.grad = None if without else gradient.clone()
        ours.step()
        theirs.step()
        assert all(torch.equal(here, there) for here, there in pairs)


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

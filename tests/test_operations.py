"""What a training step asks of the machine, counted: a step that does more than it needs shows without a clock.

Counted on digits through PyTorch's dispatcher: the calls that reach a kernel, forward, backward and of the optimizer,
one for a whole list of tensors. The limits have a tenth of room for another PyTorch. What goes beyond one is a mistake,
or worth it, and then the limit rises.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camri_tune import training
from camri_tune.augmentation import Augmentation, draw
from camri_tune.checkpoint import TrainingState
from camri_tune.config import Loss
from camri_tune.datasets import Dataset
from camri_tune.images import Images
from camri_tune.losses import CAMRILoss
from camri_tune.models import Classifier, build_body
from camri_tune.training import EVALUATIONS, HeadSpec, Progress, Recipe, train
from tests.test_backbones import TORCHVISION

# Every kind of change to images.
STRONG = Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6, mirror=True)
BATCH, STEPS, EPOCHS = 32, 4, 2
LIMITS: dict[Loss, int] = {
    "ce": 325,
    "wce": 330,
    "crwwce": 380,
    "l2": 370,
    "arcface": 410,
    "camri": 410,
    "cosface-i": 370,
}
# No kernel runs for these.
_FREE = {"view", "_unsafe_view", "t", "detach", "alias", "expand", "permute", "transpose", "unsqueeze", "squeeze"}
_FREE |= {"select", "slice", "split", "split_with_sizes", "unbind", "as_strided", "empty", "empty_like", "new_empty"}
_FREE |= {"_record_function_enter_new", "_record_function_exit"}
# What is made on the host, or read back to it: with a GPU, a wait.
_HOST = {"_local_scalar_dense", "lift_fresh", "rand", "randn", "randperm", "nonzero", "masked_select", "unique2"}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations by name, step by step; of each copy, how many values of which type it made and of which."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Counter[str]] = []
        self.copies: list[list[tuple[int, torch.dtype, torch.dtype]]] = []
        self.transfers: list[int] = []  # from one device to another

    def begin(self) -> None:
        self.steps.append(Counter())
        self.copies.append([])
        self.transfers.append(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.steps and name not in _FREE:
            self.steps[-1][name] += 1
            if name in ("_to_copy", "copy_", "clone"):
                source = args[1] if name == "copy_" else args[0]
                self.copies[-1].append((result.numel(), source.dtype, result.dtype))
                self.transfers[-1] += source.device != result.device
        return result


def _count(data: Dataset, loss: Loss, *, device: str = "cpu") -> _Counter:
    """A short training in bfloat16, whether this machine is fast with it or not."""
    counter = _Counter()
    with pytest.MonkeyPatch.context() as patch, counter:
        patch.setattr(training, "has_fast_bfloat16", lambda device: True)
        train(
            "compact",
            HeadSpec(loss, 16.0, {3: 0.3}, {3: 2.0}, {3: 0.5}),
            data.train[np.arange(STEPS * BATCH)],
            data.validation[np.arange(BATCH)],
            num_classes=10,
            recipe=Recipe(EPOCHS, 4e-3, STRONG, batch_size=BATCH, optimizer="muon"),
            seed=0,
            device=torch.device(device),
            on_step=counter.begin,
        )
    return counter


@pytest.fixture(scope="module")
def camri(digits: Dataset) -> _Counter:
    return _count(digits, "camri")


# An epoch's last step is counted with its end, and the very first with the start of the optimizer.
INNER = [1, 2, STEPS, STEPS + 1, STEPS + 2]


def test_a_step_costs_the_same_however_many_were_before(camri: _Counter) -> None:
    assert len(camri.steps) == EPOCHS * STEPS
    assert all(camri.steps[step] == camri.steps[1] for step in INNER)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_step_is_at_most_so_many_operations(digits: Dataset, loss: Loss) -> None:
    step = _count(digits, loss).steps[1]
    assert LIMITS[loss] * 0.8 < sum(step.values()) <= LIMITS[loss], step.most_common()
    assert not {*step} & _HOST


def test_a_step_goes_through_each_layer_once_and_back(camri: _Counter) -> None:
    step = camri.steps[1]
    assert step["convolution"] == step["convolution_backward"] == 5
    assert step["native_batch_norm"] == step["native_batch_norm_backward"] == 6
    assert step["grid_sampler_2d"] == 1
    assert step["_fused_adamw_"] == 2, "one for each group that is AdamW's, however many weights it has"
    assert step["eye"] == 4, "of the network's six weights those with as many rows are made orthogonal together"
    assert step["std"] == step["avg_pool2d"] == step["native_dropout"] == 0, "what was slow on a CPU has not come back"


def test_a_step_copies_no_more_than_it_has_to(camri: _Counter) -> None:
    """Each layer's weights to bfloat16 and their gradients back; images to float, in the network's layout, then to
    bfloat16, never back; features flattened and back; embeddings to float32 and back."""
    copies = camri.copies[1]
    float32, bfloat16 = torch.float32, torch.bfloat16
    narrowed = [count for count, source, made in copies if (source, made) == (float32, bfloat16)]
    widened = [count for count, source, made in copies if (source, made) == (bfloat16, float32)]
    images, embeddings, features = BATCH * 8 * 8, BATCH * 128, BATCH * 96 * 16
    weights = [32 * 9, 64 * 32 * 9, 64 * 64 * 9, 128 * 64 * 9, 96 * 128 * 9, 128 * 96 * 16]
    assert sorted(narrowed) == sorted([*weights, images, embeddings])
    assert sorted(widened) == sorted([*weights, embeddings])
    rest = [copy for copy in copies if copy[1:] not in ((float32, bfloat16), (bfloat16, float32)) and copy[0] > 1_000]
    assert sorted(rest) == sorted([(images, torch.uint8, float32), *[(features, bfloat16, bfloat16)] * 2])


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("compact", 32),
        ("wide", 32),
        ("paper-cnn", 32),
        *((f"torchvision:{name}", side) for name, (side, _) in TORCHVISION.items()),
    ],
)
def test_networks_do_the_same_in_each_step(name: str, side: int) -> None:
    """What a GPU records of one step is then what the others do, unless something goes to the host or comes from it."""
    states: list[object] = []
    body = build_body(name, channels=3, image_size=side)
    classifier = Classifier(body, CAMRILoss(5, body.embedding_size, {1: 0.2})).train()
    images, labels = torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with _Counter() as counter:
        for _ in range(3):
            counter.begin()
            classifier.head(classifier.embed(images), labels).backward()
            classifier.zero_grad(set_to_none=True)
            states.append((random.getstate(), str(np.random.get_state())))
    first, second, third = counter.steps
    assert first == second == third
    assert not body.repeats_itself or not {*first} & _HOST
    assert states[0] == states[1] == states[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, and it counts what goes to and from one")
def test_no_step_moves_anything_between_host_and_device(digits: Dataset) -> None:
    counter = _count(digits, "camri", device="cuda")
    assert [counter.transfers[step] for step in INNER] == [0] * len(INNER)


def test_random_numbers_are_drawn_once_an_epoch(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(n: int, *rest: Any) -> Tensor:
        drawn.append(n)
        return draw(n, *rest)

    monkeypatch.setattr(training, "draw", counted)
    _count(digits, "ce")
    assert drawn == [STEPS * BATCH] * EPOCHS


def test_a_training_evaluates_six_times_and_copies_its_state_where_somebody_listens(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    states: list[int] = []
    predict, state_of = training.predict_logits, TrainingState.of

    def counted(classifier: Any, pixels: Tensor, *rest: Any, **named: Any) -> Tensor:
        evaluated.append(len(pixels))
        return predict(classifier, pixels, *rest, **named)

    def kept(epoch: int, *rest: Any) -> TrainingState:
        states.append(epoch)
        return state_of(epoch, *rest)

    monkeypatch.setattr(training, "predict_logits", counted)
    monkeypatch.setattr(TrainingState, "of", kept)
    few, validation = digits.train[np.arange(2 * BATCH)], digits.validation[np.arange(16)]

    def trained(on_epoch: Any, on: Images = validation) -> None:
        train(
            "compact",
            HeadSpec("ce"),
            few,
            on,
            num_classes=10,
            recipe=Recipe(12, 4e-3, batch_size=BATCH),
            seed=0,
            device=torch.device("cpu"),
            on_epoch=on_epoch,
        )

    heard: list[Progress] = []
    trained(heard.append)
    assert evaluated == [16] * EVALUATIONS
    assert states == [*range(1, 13)]
    evaluated.clear()
    states.clear()
    trained(None, replace(digits.validation))
    assert evaluated == [len(digits.validation)], "where validation is large beside training, at the end alone"
    assert states == []

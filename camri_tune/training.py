"""Train one model with one seed: images stay on the device, augmentation is batched tensor code.

Speed comes from three things that only work together: no data loader, channels_last, and bfloat16 where the hardware
has it; on a GPU, from a fourth, that a step is one piece of work (see recording.py). Head, margin and softmax stay in
float32 (see losses.py), and so does the final evaluation, which counts.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camri_tune.augmentation import Augmentation, augment, draw
from camri_tune.checkpoint import TrainingState
from camri_tune.config import Loss, Model, Optimizer, Precision, Schedule
from camri_tune.errors import InputError, TrainingDivergedError
from camri_tune.images import Images
from camri_tune.losses import (
    ArcFaceLoss,
    CAMRILoss,
    CosFaceLoss,
    CrossEntropyLoss,
    CRWWCELoss,
    Head,
    NormFaceLoss,
    WeightedCrossEntropyLoss,
)
from camri_tune.metrics import IntArray, confusion_matrix
from camri_tune.models import Classifier, build_body, freeze, trunk
from camri_tune.muon import Muon
from camri_tune.optimizers import SGD, Adam, AdamW, FusedOptimizer, Group
from camri_tune.recording import Recorded

EVALUATIONS = 6  # per training: enough for a learning curve
EVALUATION_BATCH = 256
CHANGED_AT_ONCE = 2**23  # values that a GPU augments together
VALUES_AT_ONCE = 3 * 2**20  # that a GPU evaluates where images are small: to launch a kernel takes the host its time


@dataclass(frozen=True)
class HeadSpec:
    """A head and loss by name, with what that loss reads of the rest.

    All map class index to a value: `margins` to radians (a cosine difference for `cosface-i`; for `arcface` the first
    holds for every class), `weights` to the factor of `wce` and to w_fn of `crwwce`, `w_fp` to that of `crwwce`.
    """

    loss: Loss
    scale: float = 16.0
    margins: dict[int, float] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    w_fp: dict[int, float] = field(default_factory=dict)

    def build(self, num_classes: int, embedding_size: int) -> Head:
        builders: dict[Loss, Callable[[int, int], Head]] = {
            "ce": CrossEntropyLoss,
            "wce": partial(WeightedCrossEntropyLoss, weight=self.weights),
            "crwwce": partial(CRWWCELoss, w_fn=self.weights, w_fp=self.w_fp),
            "l2": partial(NormFaceLoss, scale=self.scale),
            "arcface": partial(ArcFaceLoss, margin=next(iter(self.margins.values()), 0.0), scale=self.scale),
            "camri": partial(CAMRILoss, margin=self.margins, scale=self.scale),
            "cosface-i": partial(CosFaceLoss, margin=self.margins, scale=self.scale),
        }
        return builders[self.loss](num_classes, embedding_size)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the learning rate rises linearly over a fifth of the steps, then falls to zero.

    `muon` moves the network's matrices and kernels, AdamW all else then; SGD is with Nesterov's momentum of 0.9.
    `warmup` is the share of the steps in which the rate rises, whatever the `schedule` does then; `precision` is the
    network's alone. With `accumulation` a batch is taken in so many parts whose gradients are added up, which needs
    less memory and gives the same step but for what batch normalisation sees. Of the network only what `trainable` says
    changes, at `backbone_lr` times the learning rate of the head.
    """

    epochs: int
    learning_rate: float
    augmentation: Augmentation = field(default_factory=Augmentation)
    batch_size: int = 256
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.2
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "linear"
    precision: Precision = "auto"
    label_smoothing: float = 0.0
    accumulation: int = 1
    trainable: str = "all"
    backbone_lr: float = 1.0


_PAPER: dict[str, Any] = {
    "batch_size": 64,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "schedule": "constant",
    "warmup": 0.0,
}
# The networks that Muon was measured on; a library's have what everybody takes.
_BY_MUON: tuple[Model, ...] = ("compact", "wide")


def recipe_of(model: Model, *, epochs: int, learning_rate: float, augmentation: Augmentation, images: int) -> Recipe:
    """The recipe that belongs to a network. The paper's has the authors': Adam, constant rate, 64 images, unchanged."""
    if model == "paper-cnn":
        return Recipe(epochs, learning_rate, **_PAPER)
    # Few training images are few steps: smaller batches make up for it.
    large = 512 if model == "wide" else 256
    batch_size = large if images >= 16_384 else 128
    optimizer: Optimizer = "muon" if model in _BY_MUON else "adamw"
    return Recipe(epochs, learning_rate, augmentation, batch_size, optimizer=optimizer)


def with_choices(recipe: Recipe, choices: Mapping[str, Any], augmentation: Augmentation) -> Recipe:
    """A network's recipe with what a study chooses in its place: values by field, None where it chooses nothing.

    That of `augmentation` is a factor of the data set's changes, whether or not the network's recipe has them.
    """
    chosen = {name: value for name, value in choices.items() if value is not None}
    if (strength := chosen.get("augmentation")) is not None:
        chosen["augmentation"] = augmentation.times(strength)
    return replace(recipe, **chosen)


def default_learning_rate(model: Model, optimizer: Optimizer | None = None) -> float:
    """Where the search for the baseline's learning rate starts."""
    if optimizer == "sgd":
        return 0.05
    return 4e-3 if model in _BY_MUON else 1e-3


@dataclass(frozen=True)
class Progress:
    """What `on_epoch` hears: epochs done (1-based), mean training loss, and, on evaluation epochs, the confusion.

    `state` is what training goes on from, a copy.
    """

    epoch: int
    epochs: int
    loss: float
    confusion: IntArray | None
    state: TrainingState


@dataclass(frozen=True)
class Trained:
    """A trained model with what float32 says of it on validation, and the seconds it took.

    `confusion` is (C, C), and `right` (N,) says which images were predicted right.
    """

    classifier: Classifier
    confusion: IntArray
    right: NDArray[np.bool_]
    seconds: float


@contextmanager
def _exact() -> Iterator[None]:
    """The same result each time, in float32 where that is said: by default a GPU's convolutions give neither."""
    cudnn: Any = torch.backends.cudnn
    try:
        flags: list[tuple[Any, str, Any, Any]] = [(cudnn, "allow_tf32", cudnn.allow_tf32, False)]
    except RuntimeError:  # it cannot be read where a script has set what PyTorch has in its place by now
        flags = [(kind, "fp32_precision", kind.fp32_precision, "ieee") for kind in (cudnn.conv, cudnn.rnn)]
    flags.append((cudnn, "deterministic", cudnn.deterministic, True))
    for place, name, _, exact in flags:
        setattr(place, name, exact)
    try:
        yield
    finally:
        for place, name, before, _ in flags:
            setattr(place, name, before)


@_exact()
def train(
    model: Model,
    head: HeadSpec,
    images: Images,
    validation: Images,
    *,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[Progress], None] | None = None,
    on_step: Callable[[], None] | None = None,
    resume: TrainingState | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Train `model` with `head` on `images`; score `validation`.

    The same seed on the same device with the same number of threads gives the same weights, also where the training
    goes on from the state that an interrupted one left (`resume`); on a GPU only if no pools of the network overlap,
    whose gradients it adds up in any order, as those of `compact` do at a side of 28. The network begins with the
    weights in `start`, by name, as far as they go, and else at random. `on_epoch`, and `on_step` before each step, may
    raise to stop early. Raises TrainingDivergedError when the loss is no longer finite.
    """
    started = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights and dropout
        classifier, frozen = _initial(model, head, images, num_classes, recipe, start or {})
        classifier.to(device)
        optimizer = _optimizer(classifier, recipe, device)
        held, judged = (part.on(device) if fits(part, device) else part for part in (images, validation))
        batch_size = min(recipe.batch_size, len(images))
        steps = max(1, len(images) // batch_size)
        factor = schedule_of(steps * recipe.epochs, recipe)
        # Where validation is large beside training, fewer: they would cost more than they tell.
        affordable = 1 + recipe.epochs * len(images) // (3 * len(validation))
        evaluation_batch = _evaluation_batch(judged, device) // recipe.accumulation
        evaluate_every = math.ceil(recipe.epochs / min(EVALUATIONS, affordable))

        if resume is not None:
            resume.restore(classifier, optimizer, rng, device)

        total = torch.zeros((), device=device)  # of the losses of an epoch
        do_step = _step(classifier, optimizer, recipe, batch_size, total, device)

        for epoch in range(1 if resume is None else resume.epoch + 1, recipe.epochs + 1):
            _set_training(classifier, frozen)
            order = torch.randperm(len(images), generator=rng)[: steps * batch_size].view(steps, batch_size)
            # All random numbers of an epoch at once: no step waits for what is on its way to the device.
            drawn = (
                draw(steps * batch_size, images.channels, recipe.augmentation, rng).to(device).view(*order.shape, -1)
            )
            total.zero_()
            batches = _batches(held, order, drawn, recipe.augmentation, device)
            for done, (pixels, labels) in enumerate(batches, (epoch - 1) * steps):
                if on_step is not None:
                    on_step()
                for group in optimizer.groups:
                    group.set_rate(recipe.learning_rate * factor(done))
                do_step(pixels, labels)
                del pixels, labels
            mean_loss = float(total) / steps
            if not math.isfinite(mean_loss):
                raise TrainingDivergedError(
                    f"the training loss became {mean_loss} in epoch {epoch} with {head}, learning rate "
                    f"{recipe.learning_rate:.3g}; lower the learning rate"
                )
            confusion = None
            if epoch == recipe.epochs:
                logits = predict_logits(classifier, judged, device, batch=evaluation_batch)
                if not torch.isfinite(logits).all():  # the last step alone can ruin the weights
                    raise TrainingDivergedError(
                        f"the trained model's logits are not finite with {head}, learning rate "
                        f"{recipe.learning_rate:.3g}; lower the learning rate"
                    )
                confusion = confusion_matrix(validation.labels.numpy(), logits.argmax(dim=1).numpy(), num_classes)
            elif epoch % evaluate_every == 0:
                with _fast_precision(device, recipe.precision):
                    confusion = evaluate(
                        classifier, judged, num_classes=num_classes, device=device, batch=evaluation_batch
                    )
            if on_epoch is not None:
                state = TrainingState.of(epoch, classifier, optimizer, rng, device)
                on_epoch(Progress(epoch, recipe.epochs, mean_loss, confusion, state))
    assert confusion is not None  # the last epoch always evaluates
    optimizer.clear_gradients()  # the gradients' memory is not the trained model's to keep
    return Trained(
        classifier, confusion, (logits.argmax(dim=1) == validation.labels).numpy(), time.perf_counter() - started
    )


def _batches(
    images: Images, order: Tensor, drawn: Tensor, how: Augmentation, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's changed pixels, float (B, C, H, W), and labels, int64 (B,), a batch at a time.

    `order` (N, B) says which images each of the N batches has, and `drawn` (N, B, K) what changes them (see `draw`). On
    a GPU several batches are changed together: small kernels cost their launch, not their work.
    """
    values = order.shape[1] * math.prod(images.store.shape[1:])
    together = max(1, CHANGED_AT_ONCE // values) if device.type == "cuda" else 1
    parts = (torch.split(tensor, together) for tensor in (order.to(images.store.device), drawn))
    for places, numbers in zip(*parts, strict=True):
        pixels, labels = (tensor.to(device) for tensor in images.batch(places.flatten()))
        changed = augment(pixels, how, numbers.flatten(0, 1))
        yield from zip(changed.chunk(len(places)), labels.chunk(len(places)), strict=True)
        del pixels, labels, changed  # before the next are made: images can be large


def _step(
    classifier: Classifier,
    optimizer: FusedOptimizer,
    recipe: Recipe,
    batch_size: int,
    total: Tensor,
    device: torch.device,
) -> Callable[[Tensor, Tensor], None]:
    """What each step does with pixels (B, C, H, W) and labels (B,); it adds the loss to `total` ()."""

    count = recipe.accumulation if batch_size // recipe.accumulation > 1 else 1  # one image is nothing to normalise by

    def step(pixels: Tensor, labels: Tensor) -> None:
        optimizer.clear_gradients()
        for some, their_labels in zip(pixels.chunk(count), labels.chunk(count), strict=True):
            with _fast_precision(device, recipe.precision):
                embeddings = classifier.embed(some)
            loss = classifier.head(embeddings, their_labels) * (len(some) / batch_size)
            loss.backward()
            total.add_(loss.detach())
        optimizer.step()

    return Recorded(step, device) if device.type == "cuda" and classifier.body.repeats_itself else step


def _initial(
    model: Model, head: HeadSpec, images: Images, num_classes: int, recipe: Recipe, start: Mapping[str, Tensor]
) -> tuple[Classifier, list[nn.Module]]:
    """The model that a training begins with, and those of its modules that stay as they are."""
    body = build_body(model, channels=images.channels, image_size=images.side)
    trunk(body).load_state_dict(start, strict=False)
    frozen = freeze(body, recipe.trainable)
    built = head.build(num_classes, body.embedding_size)
    built.label_smoothing = recipe.label_smoothing
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(_again_in_float32)
    return Classifier(body, built), frozen


def _again_in_float32(convolution: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """The result of a convolution anew, where it is wrong in bfloat16 on a CPU; None elsewhere."""
    if output.dtype != torch.bfloat16 or output.device.type != "cpu" or not _is_wrong(convolution, inputs[0]):
        return None
    with torch.autocast("cpu", enabled=False):
        again: Tensor = convolution.forward(inputs[0].float())
    return again.to(output.dtype)


def _is_wrong(convolution: nn.Conv2d, maps: Tensor) -> bool:
    """Whether this is one of the shapes that oneDNN gets wrong with AMX, as benchmarks/kernels.py found (PyTorch 2.14).

    Where the stride is larger than the map, and in dilated kernels of groups, part of the kernel's gradient is never
    written and is what was in that memory before, NaN among it. Large patches of few channels come out wrong.
    """
    kernel, stride = convolution.kernel_size, convolution.stride
    small = max(kernel) > 1 and any(side < step for side, step in zip(maps.shape[-2:], stride, strict=True))
    grouped = convolution.groups > 1 and max(convolution.dilation) > 1
    patches = kernel == stride and max(stride) >= 4 and 3 < convolution.in_channels < 32
    return small or grouped or patches


def _set_training(classifier: Classifier, frozen: Sequence[nn.Module]) -> None:
    classifier.train()
    for module in frozen:
        module.training = False


def evaluate(
    classifier: Classifier,
    images: Images,
    *,
    num_classes: int,
    device: torch.device,
    batch: int | None = None,
) -> IntArray:
    """Confusion matrix (C, C) of `classifier` on `images`, so many at a time."""
    predictions = predict_logits(classifier, images, device, batch=batch).argmax(dim=1)
    return confusion_matrix(images.labels.cpu().numpy(), predictions.numpy(), num_classes)


@_exact()
@torch.no_grad()
def predict_logits(
    classifier: Classifier, images: Images | Tensor, device: torch.device, *, batch: int | None = None
) -> Tensor:
    """Logits (N, C) on the CPU of images, or of uint8 pixels (N, C, S, S), so many at a time."""
    classifier.eval()
    pieces = images.split(batch or _evaluation_batch(images, device))
    return torch.cat([classifier(some.to(device)).float().cpu() for some in pieces])


@torch.no_grad()
def predict(classifier: Classifier, images: Images, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings (B, D) and logits (B, C) on the CPU, batch after batch, from one pass."""
    classifier.eval()
    for some in images.split(_evaluation_batch(images, device)):
        with _exact():
            embeddings = classifier.embed(some.to(device))
            logits = classifier.logits(embeddings)
        yield embeddings.float().cpu(), logits.float().cpu()


def _evaluation_batch(images: Images | Tensor, device: torch.device) -> int:
    if device.type != "cuda":
        return EVALUATION_BATCH
    values = math.prod((images.store if isinstance(images, Images) else images).shape[1:])
    return max(EVALUATION_BATCH, VALUES_AT_ONCE // values)


def fits(images: Images, device: torch.device) -> bool:
    """Whether a device has room for images beside the training: a quarter of what a GPU has free, for workers share."""
    return device.type != "cuda" or images.bytes < torch.cuda.mem_get_info(device)[0] / 4


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`. Raises InputError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name} is not on this machine, which has {torch.cuda.device_count()} CUDA device(s) that "
            f"PyTorch can use; choose auto or cpu"
        )
    return device


def cpu_count() -> int:
    """The processors that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: a GPU that has it, or a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU: nothing need be wrong with the settings then."""
    texts = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if known or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts)):
        return True
    # Where memory runs out while a step is recorded, the recording's end fails, too, and is what is heard of.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def _fast_precision(device: torch.device, precision: Precision) -> torch.autocast:
    enabled = has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _optimizer(classifier: Classifier, recipe: Recipe, device: torch.device) -> FusedOptimizer:
    on_gpu, groups = device.type == "cuda", []
    for part, factor in ((classifier.body, recipe.backbone_lr), (classifier.head, 1.0)):
        trained = [p for p in part.parameters() if p.requires_grad]
        weights, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        # Norms and biases are not decayed: shrinking them only fights the normalisation.
        for parameters, decay in ((weights, recipe.weight_decay), (others, 0.0)):
            rate = recipe.learning_rate * factor
            # A class's own weights are no hidden layer's: Muon leaves them, and all vectors, to AdamW.
            orthogonal = part is classifier.body and parameters is weights
            if parameters:
                held = torch.tensor(rate, device=device) if on_gpu else rate
                groups.append(Group(parameters, held, factor, decay, orthogonal))
    if recipe.optimizer == "sgd":
        return SGD(groups)
    kinds: dict[Optimizer, type[Adam]] = {"adam": Adam, "adamw": AdamW, "muon": Muon}
    return kinds[recipe.optimizer](groups, recipe.betas)


def schedule_of(total: int, recipe: Recipe) -> Callable[[int], float]:
    """The learning rate of each step, as a factor."""
    rise = max(1.0, recipe.warmup * total)

    def left(step: int) -> float:
        return max(0.0, (total - step) / max(1.0, total - rise))

    falls: dict[Schedule, Callable[[int], float]] = {
        "linear": left,
        "cosine": lambda step: (1 - math.cos(math.pi * min(1.0, left(step)))) / 2,
        "constant": lambda step: 1.0,
    }
    fall = falls[recipe.schedule]
    return lambda step: min(1.0, (step + 1) / rise, fall(step))

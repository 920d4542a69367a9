"""The networks, augmentation, and training one model with one seed, on the digits."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camri_tune.augmentation import Augmentation, augment, draw
from camri_tune.checkpoint import TrainingState
from camri_tune.config import RECIPE_FIELDS, Loss, Model, Optimizer, Precision, StudyConfig
from camri_tune.datasets import Dataset
from camri_tune.errors import CamriTuneError, InputError, TrainingDivergedError
from camri_tune.losses import (
    ArcFaceLoss,
    CAMRILoss,
    CosFaceLoss,
    CrossEntropyLoss,
    CRWWCELoss,
    NormFaceLoss,
    WeightedCrossEntropyLoss,
)
from camri_tune.metrics import accuracy
from camri_tune.models import Classifier, CompactCNN, ContrastNormalisation, PaperCNN, build_body
from camri_tune.optimizers import AdamW
from camri_tune.training import (
    HeadSpec,
    Progress,
    Recipe,
    Trained,
    _again_in_float32,
    _exact,
    _fast_precision,
    _optimizer,
    default_learning_rate,
    evaluate,
    is_out_of_memory,
    pick_device,
    predict_logits,
    recipe_of,
    schedule_of,
    train,
    with_choices,
)

CPU = torch.device("cpu")
CAMRI = HeadSpec("camri", 16.0, {3: 0.3})
LOSSES: tuple[Loss, ...] = get_args(Loss)
MODELS = ("compact", "wide", "paper-cnn")  # that take images
EMBEDDING_SIZES: dict[Model, int] = {"compact": 128, "wide": 256, "paper-cnn": 512}
# The same changes as for traffic signs: every kind but the mirror.
STRONG = Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6)


def _head(loss: Loss) -> HeadSpec:
    """Any loss with class 3 important; each reads what is its own."""
    return HeadSpec(loss, 16.0, {3: 0.3}, {3: 4.0}, {3: 0.5})


def _train(
    data: Dataset,
    head: HeadSpec = CAMRI,
    *,
    model: Model = "compact",
    recipe: Recipe | None = None,
    seed: int = 0,
    images: int = 300,
) -> Trained:
    """Train on the first few digits."""
    return train(
        model,
        head,
        data.train[np.arange(images)],
        data.validation,
        num_classes=10,
        recipe=recipe or Recipe(1, 4e-3, data.augmentation),
        seed=seed,
        device=CPU,
    )


def _hear(data: Dataset, *, epochs: int, validation: int = 16) -> tuple[Trained, list[Progress]]:
    """Train on 64 digits and keep what `on_epoch` hears. Few validation images allow evaluations on the way."""
    heard: list[Progress] = []
    trained = train(
        "compact",
        CAMRI,
        data.train[np.arange(64)],
        data.validation[np.arange(validation)],
        num_classes=10,
        recipe=Recipe(epochs, 4e-3, batch_size=32),
        seed=0,
        device=CPU,
        on_epoch=heard.append,
    )
    return trained, heard


def _equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The network


def test_the_network_for_traffic_signs_has_at_most_half_a_million_parameters() -> None:
    for head in (CrossEntropyLoss(43, 128), NormFaceLoss(43, 128)):
        classifier = Classifier(CompactCNN(3, 32), head)
        count = sum(p.numel() for p in classifier.parameters())
        assert 400_000 < count <= 500_000


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 9, 16, 17, 23, 24, 28, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("model", MODELS)
def test_images_of_any_side_become_embeddings_and_logits(model: Model, side: int, channels: int) -> None:
    body = build_body(model, channels=channels, image_size=side)
    assert body.embedding_size == EMBEDDING_SIZES[model]
    classifier = Classifier(body, CAMRILoss(43, body.embedding_size, {1: 0.2}))
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    for mode in (True, False):
        classifier.train(mode)
        embeddings = classifier.embed(images)
        assert embeddings.shape == (2, EMBEDDING_SIZES[model])
        assert embeddings.isfinite().all()
        assert classifier(images).shape == (2, 43)


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_the_heads_without_a_margin(model: Model) -> None:
    head = CAMRILoss(10, EMBEDDING_SIZES[model], {1: 0.5}, 7.0)
    classifier = Classifier(build_body(model, channels=1, image_size=8), head).eval()
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    expected = 7.0 * torch.cosine_similarity(classifier.embed(images)[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(classifier(images), expected)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(KeyError, match="colossal"):
        build_body("colossal", channels=1, image_size=8)


def _scene(seed: int, channels: int = 3) -> Tensor:
    """Images of strong contrast in the middle of the range, so that light can change without clipping."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(4, channels, 16, 16, generator=rng) * 120 + 60


@given(seed=st.integers(0, 2**31 - 1), brightness=st.floats(-60, 60))
@settings(deadline=None, max_examples=25)
def test_brightness_does_not_reach_the_network(seed: int, brightness: float) -> None:
    normalise, images = ContrastNormalisation(), _scene(seed)
    torch.testing.assert_close(normalise(images + brightness), normalise(images), rtol=0, atol=1e-4)


@given(seed=st.integers(0, 2**31 - 1), contrast=st.floats(0.5, 1.4))
@settings(deadline=None, max_examples=25)
def test_contrast_hardly_reaches_the_network(seed: int, contrast: float) -> None:
    """Hardly: the constant that keeps blank images quiet counts for more where there is less contrast."""
    normalise, images = ContrastNormalisation(), _scene(seed)
    usual, changed = normalise(images), normalise(images * contrast)
    ratio = changed.std((1, 2, 3)) / usual.std((1, 2, 3))
    assert (ratio > 0.8).all()
    assert (ratio < 1.1).all()
    torch.testing.assert_close(changed / ratio[:, None, None, None], usual, rtol=1e-3, atol=1e-4)
    assert (images * contrast).std() / images.std() == pytest.approx(contrast)


def test_each_image_is_normalised_by_itself() -> None:
    normalise, images = ContrastNormalisation(), _scene(0)
    together = normalise(images)
    for row in range(len(images)):
        torch.testing.assert_close(normalise(images[row : row + 1])[0], together[row])
    torch.testing.assert_close(together.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)


def test_a_blank_image_stays_quiet() -> None:
    blank = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    assert torch.equal(ContrastNormalisation()(blank), torch.zeros(2, 3, 8, 8))
    blank[:, :, 0, 0] += 1
    assert ContrastNormalisation()(blank).abs().max() < 0.2, "one grey level is no sign"


def test_whole_numbers_and_fractions_are_normalised_alike() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(ContrastNormalisation()(images), ContrastNormalisation()(images.float()))


def test_contrast_is_the_standard_deviation_with_a_floor() -> None:
    images = _scene(3).double() / 255
    expected = (images - images.mean((1, 2, 3), keepdim=True)) / (images.std((1, 2, 3), keepdim=True) + 0.03)
    torch.testing.assert_close(ContrastNormalisation()(images.float() * 255).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 24, 32])
def test_the_largest_is_taken_before_relu_to_the_same_effect(side: int) -> None:
    """Values and gradients are those of ReLU before each pool, ties among zeros included."""
    torch.manual_seed(0)
    features = CompactCNN(3, side).features.eval()
    layers = list(features)
    pools = [place for place, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d | nn.AdaptiveMaxPool2d)]
    for place in pools:
        layers[place : place + 2] = layers[place + 1], layers[place]
    other = nn.Sequential(*layers)
    assert [type(layer) for layer in other] != [type(layer) for layer in features]
    image = torch.randn(4, 3, side, side)
    results = []
    for network in (features, other):
        x = image.clone().requires_grad_()
        maps = network(x)
        (slope,) = torch.autograd.grad(maps.square().sum(), x)
        results.append((maps, slope))
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)
    assert (results[0][0] == 0).any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 1_001])
def test_dropout_is_torchs_but_for_which_values(count: int) -> None:
    dropout = next(layer for layer in CompactCNN(1, 8).embed if isinstance(layer, nn.Dropout))
    assert dropout.p == 0.3
    x = torch.full((3, count), 2.0, requires_grad=True)
    assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(0)
    seen = torch.cat([dropout.train()(x) for _ in range(max(1, 20_000 // count))])
    kept = seen != 0
    torch.testing.assert_close(seen[kept], torch.full_like(seen[kept], 2 / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    y = dropout(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, y.detach() / 2)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))


def test_the_compact_network_evens_out_light_before_all_else() -> None:
    body, images = CompactCNN(3, 16).eval(), _scene(1)
    torch.testing.assert_close(body(images + 40), body(images), rtol=1e-3, atol=1e-4)


# The authors' network, written out from what is known of their code: kind, and channels in and out.
PAPER: list[tuple[type[nn.Module], int, int]] = [
    (nn.Conv2d, 3, 64),
    (nn.ReLU, 64, 64),
    (nn.Conv2d, 64, 64),
    (nn.ReLU, 64, 64),
    (nn.BatchNorm2d, 64, 64),
    (nn.Conv2d, 64, 64),
    (nn.ReLU, 64, 64),
    (nn.MaxPool2d, 64, 64),
    (nn.Dropout, 64, 64),
    (nn.Conv2d, 64, 128),
    (nn.ReLU, 128, 128),
    (nn.Conv2d, 128, 128),
    (nn.ReLU, 128, 128),
    (nn.BatchNorm2d, 128, 128),
    (nn.Conv2d, 128, 128),
    (nn.ReLU, 128, 128),
    (nn.MaxPool2d, 128, 128),
    (nn.Dropout, 128, 128),
    (nn.Conv2d, 128, 256),
    (nn.ReLU, 256, 256),
    (nn.Conv2d, 256, 256),
    (nn.ReLU, 256, 256),
    (nn.BatchNorm2d, 256, 256),
    (nn.Conv2d, 256, 256),
    (nn.ReLU, 256, 256),
    (nn.Conv2d, 256, 256),
    (nn.ReLU, 256, 256),
    (nn.Conv2d, 256, 256),
    (nn.ReLU, 256, 256),
    (nn.BatchNorm2d, 256, 256),
    (nn.Conv2d, 256, 512),
    (nn.ReLU, 512, 512),
    (nn.Conv2d, 512, 512),
    (nn.ReLU, 512, 512),
    (nn.AdaptiveAvgPool2d, 512, 512),
    (nn.Flatten, 512, 512),
    (nn.Linear, 512, 512),
    (nn.BatchNorm1d, 512, 512),
]


def _leaves(body: nn.Module) -> list[nn.Module]:
    return [module for module in body.modules() if not list(module.children())]


def test_the_papers_network_layer_by_layer() -> None:
    """As they run, with the shapes that pass: 3x3 with padding keeps sizes, so the maps are 32, 16, 8 and then 1."""
    body = PaperCNN(3, 32)
    ran: list[tuple[type[nn.Module], int, int]] = []
    sides: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        ran.append((type(module), inputs[0].shape[1], output.shape[1]))
        if isinstance(module, nn.Conv2d | nn.AdaptiveAvgPool2d):
            assert output.shape[2] == output.shape[3]
            sides.append(output.shape[2])

    for leaf in _leaves(body):
        leaf.register_forward_hook(note)
    assert body(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 512)
    assert ran == PAPER
    assert sides == [32] * 3 + [16] * 3 + [8] * 7 + [1]


def test_the_papers_layers_are_what_the_paper_has() -> None:
    for layer in _leaves(PaperCNN(3, 32)):
        match layer:
            case nn.Conv2d():
                assert layer.kernel_size == (3, 3)
                assert layer.stride == layer.padding == layer.dilation == (1, 1)
                assert layer.groups == 1
                assert layer.bias is not None
            case nn.MaxPool2d():
                assert (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0)
            case nn.Dropout():
                assert layer.p == 0.25
            case nn.AdaptiveAvgPool2d():
                assert layer.output_size == 1
            case nn.Linear():
                assert layer.bias is not None
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                assert layer.affine
                assert layer.track_running_stats


@pytest.mark.parametrize(("channels", "first"), [(3, 1_792), (1, 640)])
def test_the_papers_network_has_as_many_parameters_as_counted_by_hand(channels: int, first: int) -> None:
    """A convolution from a to b channels has 9ab + b, a normalisation of c channels 2c."""
    convolutions = first + 2 * 36_928 + 73_856 + 2 * 147_584 + 295_168 + 4 * 590_080 + 1_180_160 + 2_359_808
    normalisations = 2 * (64 + 128 + 256 + 256)
    dense, last = 512 * 512 + 512, 2 * 512
    assert sum(p.numel() for p in PaperCNN(channels, 32).parameters()) == convolutions + normalisations + dense + last
    if channels == 3:
        assert convolutions + normalisations + dense + last == 6_905_216


def test_the_papers_network_computes_what_is_written_here() -> None:
    """By hand from the weights alone, in evaluation; normalisations with figures of their own."""
    body = PaperCNN(3, 16)
    rng = torch.Generator().manual_seed(1)
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(layer, name)
                values.data.copy_(torch.rand(values.shape, generator=rng) + 0.5)
    body.eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=rng, dtype=torch.uint8)
    # In the order in which the network has them, which is that of PAPER.
    tensors = [parameter.detach().double() for parameter in body.parameters()]
    running = [buffer.double() for name, buffer in body.named_buffers() if "running" in name]

    def normalised(x: Tensor) -> Tensor:
        weight, bias = tensors.pop(0), tensors.pop(0)
        mean, variance = running.pop(0), running.pop(0)
        shape = (1, -1, 1, 1)[: x.ndim]
        centred = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return weight.view(shape) * centred + bias.view(shape)

    x = images.double() / 255
    for kind, _, _ in PAPER:
        if kind is nn.Conv2d:
            x = F.conv2d(x, tensors.pop(0), tensors.pop(0), padding=1)
        elif kind is nn.ReLU:
            x = x.clamp(min=0)
        elif kind in (nn.BatchNorm2d, nn.BatchNorm1d):
            x = normalised(x)
        elif kind is nn.MaxPool2d:
            x = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
        elif kind is nn.AdaptiveAvgPool2d:
            x = x.mean((2, 3))
        elif kind is nn.Linear:
            x = x @ tensors.pop(0).T + tensors.pop(0)
    assert not tensors
    assert not running
    for given_images in (images, images.float()):
        torch.testing.assert_close(body(given_images).double(), x, rtol=1e-3, atol=1e-4)


def test_the_papers_dense_layer_starts_as_he_et_al_say() -> None:
    torch.manual_seed(0)
    weight = PaperCNN(3, 32).embed.get_parameter("0.weight").detach()
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    # A plain dense layer of torch is uniform up to 1 / sqrt(512); a normal one leaves that behind often.
    assert (weight.abs() > 1 / math.sqrt(512)).float().mean() == pytest.approx(0.48, abs=0.02)


def test_the_papers_network_gets_pixels_between_zero_and_one_and_no_other_normalisation() -> None:
    body = PaperCNN(1, 8)
    seen: list[Tensor] = []
    first = body.features[0]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    images[0] = 255
    images[1] = 0
    body(images)
    assert torch.equal(seen[0], images.float() / 255)


# Heads by name


def test_a_head_is_built_by_name() -> None:
    margins, weights, w_fp = {1: 0.25, 3: 0.5}, {1: 2.0, 3: 8.0}, {1: 0.5, 2: 4.0}
    expected: dict[Loss, tuple[type, dict[str, list[float]]]] = {
        "ce": (CrossEntropyLoss, {}),
        "wce": (WeightedCrossEntropyLoss, {"weights": [1.0, 2.0, 1.0, 8.0]}),
        "crwwce": (CRWWCELoss, {"w_fn": [1.0, 2.0, 1.0, 8.0]}),
        "l2": (NormFaceLoss, {}),
        "camri": (CAMRILoss, {"margins": [0.0, 0.25, 0.0, 0.5]}),
        "cosface-i": (CosFaceLoss, {"margins": [0.0, 0.25, 0.0, 0.5]}),
        "arcface": (ArcFaceLoss, {"margins": [0.25] * 4}),
    }
    assert set(expected) == set(LOSSES)
    for loss, (kind, by_class) in expected.items():
        head = HeadSpec(loss, 9.0, margins, weights, w_fp).build(4, 6)
        assert type(head) is kind
        if isinstance(head, NormFaceLoss):
            assert head.scale == 9.0
        if isinstance(head, CRWWCELoss):
            assert head.w_fp.tolist() == [[0.0] * 4, [0.5, 0.0, 0.5, 0.5], [4.0, 4.0, 0.0, 4.0], [0.0] * 4]
        for name, values in by_class.items():
            assert head.get_buffer(name).tolist() == values
        assert head.get_logits(torch.randn(2, 6)).shape == (2, 4)


# Augmentation


def _varied(n: int = 64, channels: int = 3, side: int = 16) -> Tensor:
    """Smooth pictures, bright at the left and dark at the right, each a little different."""
    rng = torch.Generator().manual_seed(7)
    ramp = torch.linspace(200, 40, side).expand(n, channels, side, side)
    wave = 25 * torch.sin(torch.linspace(0, 6, side))[:, None] * torch.rand(n, channels, 1, 1, generator=rng)
    return (ramp + wave).round().to(torch.uint8)


def _augmented(images: Tensor, how: Augmentation, seed: int = 0) -> Tensor:
    return _next_changed(images, how, torch.Generator().manual_seed(seed))


def _next_changed(images: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    return augment(images, how, draw(len(images), images.shape[1], how, rng))


def _leans_left(images: Tensor) -> Tensor:
    """Whether each image is brighter on its left half."""
    half = images.shape[-1] // 2
    return images[..., :half].mean((1, 2, 3)) > images[..., half:].mean((1, 2, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 16, 33])
def test_augmentation_keeps_shape_and_about_the_range(side: int, channels: int) -> None:
    images = _varied(16, channels, side)
    before = images.clone()
    changed = _augmented(images, replace(STRONG, mirror=True))
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert changed.isfinite().all()
    assert changed.min() >= 0
    assert changed.max() < 255 * 2.2
    assert torch.equal(images, before), "the data set itself must not change"


def test_augmentation_is_the_generators_alone() -> None:
    images, how = _varied(), replace(STRONG, mirror=True)
    first = _augmented(images, how, seed=1)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(first, _augmented(images, how, seed=1))
    assert not torch.equal(first, _augmented(images, how, seed=2))


def test_the_next_batch_is_changed_differently() -> None:
    rng, images = torch.Generator().manual_seed(0), _varied()
    assert not torch.equal(_next_changed(images, STRONG, rng), _next_changed(images, STRONG, rng))


def test_each_image_is_changed_in_its_own_way() -> None:
    same = _varied(1).expand(16, -1, -1, -1)
    changed = _augmented(same, STRONG)
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 16


def test_no_augmentation_gives_the_same_pixels() -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(_augmented(images, Augmentation()), images.float())


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_every_kind_of_augmentation_changes_most_images(name: str) -> None:
    how = replace(Augmentation(), **{name: True if name == "mirror" else getattr(STRONG, name)})
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    change = (_augmented(images, how) - images).abs().mean((1, 2, 3))
    assert 0.25 < (change > 0.5).float().mean() <= 1


def test_a_mirrored_image_is_the_image_mirrored_and_about_half_are() -> None:
    images = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8)
    changed = _augmented(images, Augmentation(mirror=True))
    as_it_was, mirrored = (
        (changed - other.float()).abs().amax((1, 2, 3)) < 0.01 for other in (images, images.flip(-1))
    )
    assert (as_it_was ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_without_mirror_no_image_is_mirrored_however_strong_the_rest() -> None:
    images = _varied(400)
    assert _leans_left(images.float()).all()
    assert _leans_left(_augmented(images, replace(STRONG, light=0.0))).all()
    assert 120 < _leans_left(_augmented(images, replace(STRONG, light=0.0, mirror=True))).sum() < 280


def test_a_shift_moves_by_at_most_its_fraction_of_the_side() -> None:
    side = 32
    images = torch.zeros(200, 1, side, side, dtype=torch.uint8)
    images[:, :, 15:17, 15:17] = 255
    changed = _augmented(images, Augmentation(shift=0.125))
    at = torch.arange(side, dtype=torch.float32)
    for other in (2, 3):
        moved = (changed.sum(other).squeeze(1) * at).sum(1) / changed.sum((1, 2, 3)) - 15.5
        assert moved.abs().max() <= 0.125 * side + 1e-2
        assert moved.min() < -2
        assert moved.max() > 2


def test_blur_takes_its_share_of_images_and_keeps_their_brightness() -> None:
    images = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8)
    changed = _augmented(images, Augmentation(blur=0.25))
    touched = (changed != images).any(3).any(2).any(1)
    assert 60 < touched.sum() < 140
    assert (changed[touched].std((1, 2, 3)) < images[touched].float().std((1, 2, 3))).all()
    torch.testing.assert_close(changed.mean(), images.float().mean(), rtol=0.01, atol=0)


def test_augmentation_computes_what_is_written_here() -> None:
    """Every kind at once, image by image, in float64, with the same random numbers."""
    how, side = replace(STRONG, mirror=True), 12
    images = torch.randint(0, 256, (6, 3, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    drawn = draw(len(images), 3, how, torch.Generator().manual_seed(1))
    ramp = torch.linspace(-1, 1, side).double()
    for image, numbers, changed in zip(images.double(), drawn.double(), augment(images, how, drawn), strict=True):
        u = numbers * 2 - 1
        angle, size = u[0] * math.radians(how.rotate), 1 + u[1] * how.zoom
        matrix = torch.stack([size * (1 + u[2] * how.zoom / 2) * angle.cos(), u[3] * how.shear - size * angle.sin()])
        matrix = torch.stack([matrix, torch.stack([size * angle.sin(), size * angle.cos()])])
        if u[6] < 0:
            matrix[:, 0] *= -1
        affine = torch.cat([matrix, (u[4:6] * 2 * how.shift)[:, None]], dim=1)
        grid = F.affine_grid(affine[None], [1, 3, side, side], align_corners=False)
        x = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
        contrast, brightness = (u[7:9] * how.light).exp()
        colour = (u[11:14] * how.light * 0.3).exp()[:, None, None]
        x = (((x - x.mean()) * contrast + x.mean() * brightness) * colour).clamp(0, 255)
        x = x * (1 + u[9] * how.light * ramp + u[10] * how.light * ramp[:, None]).clamp(min=0.1)
        blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = x + ((how.blur - numbers[14]) / how.blur).clamp(min=0) * (blurred - x)
        torch.testing.assert_close(changed.double(), x, rtol=1e-4, atol=0.05)


def test_light_changes_contrast_and_brightness_in_both_directions() -> None:
    images = _varied(200)
    changed = _augmented(images, Augmentation(light=0.5))
    for before, after in (
        (images.float().mean((1, 2, 3)), changed.mean((1, 2, 3))),
        (images.float().std((1, 2, 3)), changed.std((1, 2, 3))),
    ):
        assert 0.2 < (after > before).float().mean() < 0.8


# Training


def test_the_same_seed_gives_the_same_weights_bit_for_bit(digits: Dataset) -> None:
    recipe = Recipe(2, 4e-3, digits.augmentation, batch_size=128)
    first = _train(digits, recipe=recipe, seed=5)
    torch.manual_seed(123)  # what was drawn before must not matter
    again = _train(digits, recipe=recipe, seed=5)
    assert _equal_states(first.classifier, again.classifier)
    assert np.array_equal(first.confusion, again.confusion)
    other = _train(digits, recipe=recipe, seed=6)
    assert not np.array_equal(first.confusion, other.confusion)
    for name, weights in first.classifier.named_parameters():
        assert not torch.equal(weights, other.classifier.get_parameter(name)), name


# Where a map is smaller than the stride, where a dilated kernel works in groups, and large patches of few channels.
ODD_CONVOLUTIONS = [
    (nn.Conv2d(192, 96, 3, stride=2, padding=1), 1),
    (nn.Conv2d(3, 32, 2, stride=4, padding=1), 2),
    (nn.Conv2d(24, 24, 3, stride=4, padding=1, groups=24), 3),
    (nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=64).to(memory_format=torch.channels_last), 57),
    (nn.Conv2d(16, 48, 4, stride=4), 16),
]


@pytest.mark.parametrize(("convolution", "side"), ODD_CONVOLUTIONS)
def test_a_convolution_that_bfloat16_gets_wrong_is_right(convolution: nn.Conv2d, side: int) -> None:
    """Where a CPU has AMX, oneDNN leaves parts of gradients unwritten; elsewhere this is no trouble."""
    images = torch.randn(32, convolution.in_channels, side, side)
    convolution.zero_grad()
    right = convolution(images)
    right.sum().backward()
    assert convolution.weight.grad is not None
    expected = convolution.weight.grad.clone()

    handle = convolution.register_forward_hook(_again_in_float32)
    for _ in range(3):
        convolution.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = convolution(images)
        sizes = (output.numel(), images.numel(), expected.numel())
        spoilt = [torch.full((size * times,), math.nan) for size in sizes for times in (1, 2)]
        del spoilt  # the memory is handed out again, as it is
        output.float().sum().backward()
        assert (output - right).abs().max() <= 0.03 * right.abs().max()
        assert (convolution.weight.grad - expected).abs().max() <= 0.03 * expected.abs().max()
    handle.remove()


def test_training_leaves_the_callers_random_numbers_alone(digits: Dataset) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _train(digits, images=64)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "ce"])
def test_one_seed_pairs_the_losses(digits: Dataset, loss: Loss) -> None:
    """Baseline and finalist of one seed start with the same body and see the same images in the same order.

    At a learning rate of zero the weights stay what they were; the running mean of the first normalisation depends on
    the first convolution and on the images that came by, and on nothing else.
    """
    still = Recipe(1, 0.0, digits.augmentation, batch_size=100)
    body = _train(digits, HeadSpec("ce"), recipe=still, seed=4).classifier.body
    paired = _train(digits, _head(loss), recipe=still, seed=4).classifier.body
    other = _train(digits, HeadSpec("ce"), recipe=still, seed=5).classifier.body
    for name, weights in body.named_parameters():
        assert torch.equal(weights, paired.get_parameter(name)), name
    first = "features.0.weight"
    assert not torch.equal(body.get_parameter(first), other.get_parameter(first))
    mean = body.get_buffer("features.1.running_mean")
    assert mean.abs().max() > 0
    assert torch.equal(mean, paired.get_buffer("features.1.running_mean"))
    assert not torch.equal(mean, other.get_buffer("features.1.running_mean"))


def test_the_seed_decides_which_images_come_when(digits: Dataset) -> None:
    """Of four images a batch of three leaves one out; the first normalisation's running mean tells which."""
    pixels = digits.train.pixels[:4]
    left_out = set()
    for seed in range(8):
        classifier = _train(digits, recipe=Recipe(1, 0.0, batch_size=3), seed=seed, images=4).classifier
        weight = classifier.get_parameter("body.features.0.weight").detach()
        responses = F.conv2d(ContrastNormalisation()(pixels), weight, padding=1)
        means = torch.stack([0.1 * responses[torch.arange(4) != i].mean((0, 2, 3)) for i in range(4)])
        distances = (means - classifier.get_buffer("body.features.1.running_mean")).norm(dim=1)
        nearest, second = distances.sort().values[:2].tolist()
        assert nearest < second / 4, "one of the four fits, as far as bfloat16 can tell"
        left_out.add(int(distances.argmin()))
    assert len(left_out) > 1


@pytest.mark.parametrize("loss", ["ce", "wce", "crwwce", "camri", "cosface-i"])
def test_a_few_epochs_recognise_digits(digits: Dataset, loss: Loss) -> None:
    trained = _train(digits, _head(loss), recipe=Recipe(4, 8e-3), images=len(digits.train))
    assert accuracy(trained.confusion) > 0.9
    counts = torch.bincount(digits.validation.labels, minlength=10)
    assert trained.confusion.sum(axis=1).tolist() == counts.tolist(), "a row for each true class"
    assert trained.seconds > 0


def test_the_confusion_is_that_of_the_finished_model_in_full_precision(digits: Dataset) -> None:
    trained = _train(digits)
    classifier = trained.classifier.eval()
    with torch.no_grad():
        answers = classifier(digits.validation.pixels).argmax(1).tolist()
    naive = np.zeros((10, 10), np.int64)
    for label, answer in zip(digits.validation.labels.tolist(), answers, strict=True):
        naive[label, answer] += 1
    assert np.array_equal(trained.confusion, naive)
    assert np.array_equal(evaluate(classifier, digits.validation, num_classes=10, device=CPU), naive)
    assert all(parameter.dtype == torch.float32 for parameter in classifier.parameters())


def test_logits_do_not_depend_on_how_images_are_batched(digits: Dataset) -> None:
    classifier = _train(digits).classifier
    pixels = torch.cat([digits.train.pixels, digits.validation.pixels])
    logits = predict_logits(classifier, pixels, CPU)
    assert logits.shape == (len(pixels), 10)
    assert not classifier.training
    assert not logits.requires_grad
    torch.testing.assert_close(logits[-3:], predict_logits(classifier, pixels[-3:], CPU), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learning_rate", [1e10, 1e30, math.inf])
@pytest.mark.parametrize("loss", ["ce", "wce", "crwwce", "camri"])
def test_a_training_that_diverges_names_the_epoch_and_the_learning_rate(
    digits: Dataset, loss: Loss, learning_rate: float
) -> None:
    with pytest.raises(TrainingDivergedError, match=r"loss became (nan|inf) in epoch 1 .*learning rate") as raised:
        _train(digits, _head(loss), recipe=Recipe(3, learning_rate, batch_size=64))
    assert isinstance(raised.value, CamriTuneError)
    assert f"{learning_rate:.3g}" in str(raised.value)
    assert loss in str(raised.value)


def test_divergence_in_a_later_epoch_is_named_as_such(digits: Dataset) -> None:
    """One step per epoch: the first loss is still finite, and the step after it ruins the weights."""
    with pytest.raises(TrainingDivergedError, match=r"in epoch 2 "):
        _train(digits, recipe=Recipe(4, math.inf), images=100)


@pytest.mark.parametrize(
    ("epochs", "validation", "evaluated"),
    [
        (1, 16, [1]),
        (3, 16, [1, 2, 3]),
        (12, 16, [2, 4, 6, 8, 10, 12]),
        (13, 16, [3, 6, 9, 12, 13]),
        (13, 100, [5, 10, 13]),  # where validation is large beside training, fewer
        (13, 280, [13]),
    ],
)
def test_every_epoch_is_heard_and_the_last_has_the_result(
    digits: Dataset, epochs: int, validation: int, evaluated: list[int]
) -> None:
    trained, heard = _hear(digits, epochs=epochs, validation=validation)
    assert [p.epoch for p in heard] == list(range(1, epochs + 1))
    assert {p.epochs for p in heard} == {epochs}
    assert all(math.isfinite(p.loss) and p.loss > 0 for p in heard)
    assert [p.epoch for p in heard if p.confusion is not None] == evaluated
    last = heard[-1].confusion
    assert last is not None
    assert np.array_equal(last, trained.confusion)
    for progress in heard:
        assert progress.confusion is None or progress.confusion.sum() == validation


def test_listening_changes_nothing(digits: Dataset) -> None:
    """Evaluations on the way switch the network to evaluation and back; training must not notice."""
    trained, heard = _hear(digits, epochs=3)
    assert [progress.confusion is not None for progress in heard] == [True] * 3
    silent = train(  # with so many validation images, evaluated at the end alone
        "compact",
        CAMRI,
        digits.train[np.arange(64)],
        digits.validation,
        num_classes=10,
        recipe=Recipe(3, 4e-3, batch_size=32),
        seed=0,
        device=CPU,
    )
    assert _equal_states(trained.classifier, silent.classifier)


def test_the_loss_falls(digits: Dataset) -> None:
    _, heard = _hear(digits, epochs=13)
    assert heard[-1].loss < heard[0].loss / 2


def test_what_a_listener_raises_passes_through(digits: Dataset) -> None:
    class EnoughError(Exception):
        pass

    heard: list[int] = []

    def stop(progress: Progress) -> None:
        heard.append(progress.epoch)
        if progress.epoch == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        train(
            "compact",
            CAMRI,
            digits.train[np.arange(64)],
            digits.validation,
            num_classes=10,
            recipe=Recipe(5, 4e-3),
            seed=0,
            device=CPU,
            on_epoch=stop,
        )
    assert heard == [1, 2]


def _rates(total: int, warmup: float) -> Sequence[float]:
    schedule = schedule_of(total, Recipe(1, 1e-3, warmup=warmup))
    return [schedule(step) for step in range(total)]


@given(total=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_the_learning_rate_rises_once_and_then_falls_to_almost_nothing(total: int, warmup: float) -> None:
    rates = _rates(total, warmup)
    assert min(rates) > 0, "no step is wasted at zero"
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak <= warmup * total + 1
    assert schedule_of(total, Recipe(1, 1e-3, warmup=warmup))(total) == 0
    # The last step stands one even step above zero.
    assert rates[-1] <= 1 / max(1.0, total - max(1.0, warmup * total)) + 1e-12


@given(total=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_the_learning_rate_never_exceeds_what_the_recipe_says(total: int, warmup: float) -> None:
    assert max(_rates(total, warmup)) <= 1 + 1e-9


def test_the_learning_rate_reaches_its_full_height_after_the_warm_up() -> None:
    rates = _rates(100, 0.2)
    assert rates[0] == pytest.approx(0.05)
    assert rates[19] == pytest.approx(1.0)
    assert max(rates) == rates[19]
    assert rates[-1] == pytest.approx(1 / 80)


@given(total=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_a_constant_learning_rate_does_not_fall_and_rises_in_its_warm_up_alone(total: int, warmup: float) -> None:
    schedule = schedule_of(total, Recipe(1, 1e-3, warmup=warmup, schedule="constant"))
    assert {schedule(step) for step in range(math.ceil(warmup * total), total + 1)} == {1.0}
    assert [schedule(step) for step in range(math.floor(warmup * total))] == _rates(total, warmup)[
        : math.floor(warmup * total)
    ]
    without = schedule_of(total, Recipe(1, 1e-3, warmup=0.0, schedule="constant"))
    assert {without(step) for step in range(total + 1)} == {1.0}


@given(total=st.integers(2, 500), warmup=st.floats(0, 0.9))
def test_a_cosine_falls_as_one(total: int, warmup: float) -> None:
    """Beside the line it is higher before the middle and lower after it, and ends there as well."""
    schedule = schedule_of(total, Recipe(1, 1e-3, warmup=warmup, schedule="cosine"))
    rates, line = [schedule(step) for step in range(total)], _rates(total, warmup)
    assert schedule(total) == 0
    for rate, straight, step in zip(rates, line, range(total), strict=True):
        if step >= max(1.0, warmup * total):
            assert rate == pytest.approx(math.sin(math.pi / 2 * straight) ** 2)
        else:
            assert rate <= straight + 1e-12


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_an_optimizer_is_the_one_that_is_named(name: Optimizer) -> None:
    """Step for step on the same gradients, with weight decay as each has it, on weights alone."""
    ours, theirs = (Classifier(CompactCNN(1, 8), CrossEntropyLoss(10, 128)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = _optimizer(ours, Recipe(1, 1e-2, weight_decay=0.1, optimizer=name), CPU)
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    other: torch.optim.Optimizer
    if name == "sgd":
        other = torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)
    else:
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        other = kind(groups, lr=1e-2, betas=(0.9, 0.99))
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=rng)
            its.grad = mine.grad.clone()
        optimizer.step()
        other.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_training_with_momentum_goes_on_to_the_same_weights(digits: Dataset, optimizer: Optimizer) -> None:
    recipe = Recipe(2, 1e-2, digits.augmentation, batch_size=32, optimizer=optimizer, schedule="cosine")
    states: list[TrainingState] = []

    def go(resume: TrainingState | None = None) -> Trained:
        return train(
            "compact", CAMRI, digits.train[np.arange(64)], digits.validation[np.arange(16)], num_classes=10,
            recipe=recipe, seed=0, device=CPU, on_epoch=lambda p: states.append(p.state), resume=resume,
        )  # fmt: skip

    whole = go()
    assert _equal_states(whole.classifier, go(states[0]).classifier)


@pytest.mark.parametrize("precise", ["torch.backends", "torch.backends.cudnn.conv", "torch.backends.cudnn.rnn"])
def test_a_precision_that_a_script_has_set_is_in_nobodys_way(precise: str) -> None:
    """PyTorch refuses to say by its older flag what was set by its newer ones. In a process of its own: it stays."""
    code = f"""
import torch
{precise}.fp32_precision = "ieee"
from camri_tune.training import _exact
with _exact():
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.deterministic
assert {precise}.fp32_precision == "ieee"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_how_convolutions_are_computed_is_put_back() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    with _exact():
        assert not cudnn.allow_tf32
    assert (cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before


@given(how=st.builds(Augmentation, *[st.floats(0, 20)] * 5, st.floats(0, 1), st.booleans()), factor=st.floats(0, 3))
def test_the_strength_of_augmentation_is_a_factor(how: Augmentation, factor: float) -> None:
    assert how.times(1.0) == how
    assert how.times(0.0) == Augmentation()
    stronger = how.times(factor)
    for item in fields(Augmentation):
        before, after = getattr(how, item.name), getattr(stronger, item.name)
        if item.name == "mirror":
            assert after == (before and factor > 0)
        else:
            assert after == min(before * factor, 1.0 if item.name == "blur" else math.inf)


def test_what_a_study_chooses_takes_the_place_of_the_networks_own() -> None:
    for model in MODELS:
        own = recipe_of(model, epochs=3, learning_rate=1e-3, augmentation=STRONG, images=500)
        assert with_choices(own, dict.fromkeys(RECIPE_FIELDS), STRONG) == own
        chosen = with_choices(own, {"batch_size": 32, "schedule": "cosine", "augmentation": 0.5}, STRONG)
        assert chosen == replace(own, batch_size=32, schedule="cosine", augmentation=STRONG.times(0.5))
    defaults = {name: getattr(StudyConfig(), name) for name in RECIPE_FIELDS}
    own = recipe_of("compact", epochs=3, learning_rate=1e-3, augmentation=STRONG, images=500)
    assert with_choices(own, defaults, STRONG) == own, "a study that says nothing changes nothing"


@pytest.mark.parametrize(("precision", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_is_what_the_recipe_says(precision: Precision, expected: torch.dtype) -> None:
    with _fast_precision(CPU, precision):
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected


def test_a_training_has_its_recipes_precision(digits: Dataset) -> None:
    rough, fine = (
        _train(digits, recipe=Recipe(1, 1e-3, batch_size=50, precision=precision), images=50).classifier
        for precision in get_args(Precision)[1:]
    )
    assert not _equal_states(rough, fine)
    assert all(p.dtype == torch.float32 for p in (*rough.parameters(), *fine.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_smoothed_labels_are_a_share_of_all_classes_alike(loss: Loss) -> None:
    """Cross-entropy against (1 - e) of the target's own and e / C of every class; without e bit for bit as before."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 5), torch.arange(8) % 4
    head = _head(loss).build(4, 5)
    plain = head(embeddings, labels)
    head.label_smoothing = 0.0
    assert torch.equal(head(embeddings, labels), plain)
    head.label_smoothing = 0.3
    smoothed = head(embeddings, labels)
    if isinstance(head, NormFaceLoss):
        cosine, column = head.cosine(embeddings), labels[:, None]
        logits = head.scale * cosine.scatter(1, column, head.with_margin(cosine.gather(1, column), column))
    else:
        logits = head.get_logits(embeddings)
    target = 0.7 * F.one_hot(labels, 4) + 0.3 / 4
    terms = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    extra = torch.zeros(8)
    if isinstance(head, WeightedCrossEntropyLoss):
        terms = head.weights[labels] * terms
    if isinstance(head, CRWWCELoss):
        terms = head.w_fn[labels] * terms
        extra = -(head.w_fp[labels] * (1 - logits.softmax(dim=1)).log()).sum(dim=1)
    torch.testing.assert_close(smoothed, (terms + extra).mean())


def test_the_papers_recipe_is_the_authors() -> None:
    recipe = recipe_of(
        "paper-cnn", epochs=300, learning_rate=1e-3, augmentation=replace(STRONG, mirror=True), images=500
    )
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size) == (300, 1e-3, 64)
    assert recipe.augmentation == Augmentation(), "the data set's own is not theirs"
    assert (recipe.weight_decay, recipe.betas, recipe.schedule, recipe.warmup) == (0.0, (0.9, 0.999), "constant", 0.0)
    assert default_learning_rate("paper-cnn") == 1e-3


def test_the_compact_networks_recipe_has_the_data_sets_augmentation() -> None:
    recipe = recipe_of("compact", epochs=7, learning_rate=2e-3, augmentation=STRONG, images=500)
    assert recipe == Recipe(7, 2e-3, STRONG, batch_size=128, optimizer="muon")
    many = recipe_of("compact", epochs=7, learning_rate=2e-3, augmentation=STRONG, images=30_000)
    assert many == Recipe(7, 2e-3, STRONG, batch_size=256, optimizer="muon")
    assert recipe.schedule == "linear"
    assert recipe.weight_decay > 0
    assert default_learning_rate("compact") == 4e-3


def test_the_wide_networks_recipe_has_larger_batches() -> None:
    few, many = (
        recipe_of("wide", epochs=7, learning_rate=2e-3, augmentation=STRONG, images=images) for images in (500, 30_000)
    )
    assert few == Recipe(7, 2e-3, STRONG, batch_size=128, optimizer="muon")
    assert many == Recipe(7, 2e-3, STRONG, batch_size=512, optimizer="muon")
    assert default_learning_rate("wide") == 4e-3


def test_a_librarys_network_has_adamw_unless_a_study_says_otherwise() -> None:
    recipe = recipe_of("torchvision:resnet18", epochs=7, learning_rate=1e-3, augmentation=STRONG, images=500)
    assert recipe.optimizer == "adamw"
    assert default_learning_rate("torchvision:resnet18") == 1e-3
    assert default_learning_rate("torchvision:resnet18", "sgd") == 0.05


@pytest.mark.parametrize("model", MODELS)
def test_the_papers_optimizer_is_adam(model: Model) -> None:
    """Step for step on the same gradients; the compact network's recipe goes elsewhere."""
    ours, theirs = (Classifier(CompactCNN(1, 8), CrossEntropyLoss(10, 128)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    recipe = recipe_of(model, epochs=1, learning_rate=1e-2, augmentation=Augmentation(), images=500)
    optimizer = _optimizer(ours, recipe, CPU)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=rng)
            other.grad = mine.grad.clone()
        optimizer.step()
        adam.step()
    apart = max(
        (mine - other).abs().max().item() for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    if model == "paper-cnn":
        assert apart < 1e-6
    else:
        assert apart > 1e-4


def test_the_papers_network_learns_by_the_papers_recipe(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it at once: 64 images at a time as they are, one learning rate throughout, and a loss that falls."""
    images, validation = digits.train[np.arange(130)], digits.validation[np.arange(50)]
    batches: list[Tensor] = []
    rates: list[float] = []
    heard: list[Progress] = []
    step = AdamW.step

    def seen(batch: Tensor, how: Augmentation, drawn: Tensor) -> Tensor:
        batches.append(batch)
        changed = augment(batch, how, drawn)
        assert torch.equal(changed, batch.float())
        return changed

    def counted(optimizer: AdamW) -> None:
        rates.extend(float(group.rate) for group in optimizer.groups)
        step(optimizer)

    monkeypatch.setattr("camri_tune.training.augment", seen)
    monkeypatch.setattr(AdamW, "step", counted)
    trained = train(
        "paper-cnn",
        CAMRI,
        images,
        validation,
        num_classes=10,
        recipe=recipe_of("paper-cnn", epochs=6, learning_rate=1e-3, augmentation=STRONG, images=500),
        seed=0,
        device=CPU,
        on_epoch=heard.append,
    )
    assert [len(batch) for batch in batches] == [64] * 12
    assert set(rates) == {1e-3}
    losses = [progress.loss for progress in heard]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] / 2
    assert isinstance(trained.classifier.body, PaperCNN)
    assert predict_logits(trained.classifier, validation.pixels, CPU).isfinite().all()
    assert trained.confusion.sum() == 50


def test_the_papers_network_is_its_seeds_alone(digits: Dataset) -> None:
    recipe = recipe_of("paper-cnn", epochs=1, learning_rate=1e-3, augmentation=Augmentation(), images=500)
    first, again, other = (
        _train(digits, model="paper-cnn", recipe=recipe, seed=seed, images=64).classifier for seed in (1, 1, 2)
    )
    assert _equal_states(first, again)
    assert not _equal_states(first, other)


def test_a_lack_of_memory_is_known_behind_what_it_led_to() -> None:
    def fail(first: Exception) -> RuntimeError:
        try:
            try:
                raise first
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    assert is_out_of_memory(fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert not is_out_of_memory(fail(ValueError("something else")))


def test_the_device_is_chosen_or_named_as_missing() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match=r"^--device cuda:99 is not on this machine, which has \d+ CUDA"):
        pick_device("cuda:99")

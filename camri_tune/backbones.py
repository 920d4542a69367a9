"""Networks that are not ours: torchvision's and timm's classifiers, without their classifier, and the user's own.

Nothing is downloaded: libraries' networks have random weights. A name may come from anybody, in a study file or an
exported model: it chooses among what these libraries have registered, or what the user has allowed (see own_networks),
and nothing else is imported or called.
"""

import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from camri_tune.config import Model, is_own_model, package_of
from camri_tune.errors import InputError
from camri_tune.own_networks import factory_of, reason_of

SMALLEST_SIDE, LARGEST_SIDE = 8, 512  # that a study takes; a few networks would like more
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSES = 1_000  # of a network that torchvision builds: its last layer is told by them
# Kinds of torchvision's networks that were seen to repeat themselves on a GPU (tests/test_cuda.py).
_REPEATING = ("alexnet", "convnext", "googlenet", "inception", "mobilenet_v3", "regnet", "resnet", "squeezenet", "vit")
_DRAWS = (Tensor.normal_, Tensor.uniform_)
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class Backbone(nn.Module):
    """A network with its own normalisation: images (N, C, S, S) of range 0 to 255 to embeddings (N, D).

    Grey images stand in each of the network's three channels. Mean and deviation are kept with the weights.
    `repeats_itself` promises the same work in each training step and nothing read back to the host (see recording.py).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: nn.Module,
        embedding_size: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        repeats_itself: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.embedding_size = embedding_size
        self.repeats_itself = repeats_itself
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values)[:, None, None] * 255)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.deviation
        embeddings: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return embeddings


class _Design(NamedTuple):
    """What is known of a network before it is built. `build` takes the side of the images."""

    build: Callable[[int], nn.Module]
    side: int | None
    mean: Sequence[float]
    deviation: Sequence[float]


class ShapesOnly(TorchFunctionMode):
    """Within it networks are built without memory for their weights, on PyTorch's meta device.

    Unlike `torch.device("meta")` it leaves alone what sizes are computed with, as torchvision's RegNet does. There is
    nothing to draw weights in, and to try would import TorchDynamo, which takes seconds.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in _DRAWS and args[0].is_meta:
            return args[0]
        if function in _MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def without_memory(name: Model) -> AbstractContextManager[object]:
    """`ShapesOnly` where that is enough to know a network by. The user's own may read weights, or compute with them."""
    return nullcontext() if is_own_model(name) else ShapesOnly()


def build_backbone(name: Model, *, channels: int, image_size: int) -> Backbone:
    """The network called `torchvision:NAME`, `timm:NAME` or `module:factory`, new, from torch's global generator.

    Raises InputError where there is none of that name, or where it does not take such images.
    """
    size = embedding_size(name, channels, image_size)
    design = _design(name)
    repeats = name.startswith(tuple(f"torchvision:{kind}" for kind in _REPEATING))
    return Backbone(design.build(image_size), size, design.mean, design.deviation, repeats)


@functools.cache
def embedding_size(name: Model, channels: int, image_size: int) -> int:
    """The D of a network's embeddings (N, D), by running it. Raises InputError as `build_backbone`."""
    if channels not in (1, 3):
        raise InputError(f"network {name!r} takes images of 1 or 3 channels, not of {channels}: choose compact")
    design = _design(name)
    device = "cpu" if is_own_model(name) else "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            with without_memory(name):
                network = design.build(image_size).eval()
            found = network.to(device)(torch.zeros(2, 3, image_size, image_size, device=device))
    except InputError:
        raise
    except Exception as error:  # whatever it is that this network has against such images
        limit = f", and at most {LARGEST_SIDE} are taken" if (design.side or 0) > LARGEST_SIDE else ""
        made_for = f" (it was made for {design.side}{limit})" if design.side else ""
        raise InputError(
            f"network {name!r} does not take images of {image_size} pixels a side ({reason_of(error)}): give another "
            f"--image-size{made_for}"
        ) from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2 or not found.is_floating_point():
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"network {name!r} makes {shape} of 2 images, but should make an embedding (2, D): choose another"
        )
    for key, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise InputError(f"network {name!r} has {key!r} in {parameter.dtype}, not in float32: choose another")
    return found.shape[1]


def default_image_size(name: Model) -> int | None:
    """The side of the images that a network was made for, at most `LARGEST_SIDE`; None where it was made for none.

    Raises InputError.
    """
    if not (package_of(name) or is_own_model(name)) or (side := _design(name).side) is None:
        return None
    return min(side, LARGEST_SIDE)


def _design(name: Model) -> _Design:
    if is_own_model(name):
        return _of_the_users(name)
    library, _, own = name.partition(":")
    return {"torchvision": _of_torchvision, "timm": _of_timm}[library](own)


@functools.cache
def _of_the_users(name: Model) -> _Design:
    factory = factory_of(name)

    def build(side: int) -> nn.Module:
        try:
            made = factory()
        except (Exception, SystemExit) as error:  # whatever it may be
            raise InputError(f"network {name!r} cannot be made ({reason_of(error)}); mend its function") from None
        if not isinstance(made, nn.Module):
            raise InputError(
                f"network {name!r} is {type(made).__name__}, but its function should return a torch.nn.Module"
            )
        if side and any(map(is_lazy, (*made.parameters(), *made.buffers()))):  # their sizes come from their input
            made.eval()(torch.zeros(2, 3, side, side))
            made.train()
        return made

    with torch.random.fork_rng(devices=[]):
        made = build(0)
    sizes = {}
    for key, usual in zip(("mean", "std"), _IMAGENET, strict=True):
        values = getattr(made, key, usual)
        try:
            sizes[key] = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()  # (3, 1, 1), as applied, too
        except (TypeError, ValueError, RuntimeError):
            sizes[key] = []
        low = math.nextafter(0, 1) if key == "std" else 0
        if len(sizes[key]) != 3 or not all(low <= value <= 1 for value in sizes[key]):
            raise InputError(
                f"network {name!r} has a {key} that is not three numbers from 0 to 1, as of images from 0 to 1; mend "
                f"it, or leave it out for ImageNet's"
            )
    side = getattr(made, "image_size", None)
    if isinstance(side, tuple | list) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    if side is not None and (not isinstance(side, int) or side < SMALLEST_SIDE):
        raise InputError(
            f"network {name!r} has an image_size that is not a number of pixels from {SMALLEST_SIDE}; mend it, or "
            f"leave it out"
        )
    return _Design(build, side, sizes["mean"], sizes["std"])


@functools.cache
def _of_torchvision(name: str) -> _Design:
    from torchvision import models  # noqa: PLC0415 - only where it is asked for

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    weights = models.get_model_weights(name)
    wanted = weights.DEFAULT.transforms.keywords
    mean, deviation = (wanted.get(key, usual) for key, usual in zip(("mean", "std"), _IMAGENET, strict=True))
    of_inception = name in ("googlenet", "inception_v3")
    if of_inception:  # with weights torchvision has them undo ImageNet's, since they were trained on -1 to 1
        mean = deviation = (0.5,) * 3

    def build(side: int) -> nn.Module:
        options: dict[str, Any] = {}
        if of_inception:
            options = {"aux_logits": False, "init_weights": True}  # one loss, not three
        elif name.startswith("vit_"):
            options = {"image_size": side}
        elif name.startswith("maxvit_"):
            options = {"input_size": (side, side)}
        network: nn.Module = models.get_model_builder(name)(weights=None, num_classes=_CLASSES, **options)
        places = [place for place, layer in network.named_modules() if _outputs(layer) == _CLASSES]
        network.set_submodule(places[-1], nn.Identity())
        return network

    return _Design(build, wanted["crop_size"], mean, deviation)


def _outputs(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) else None  # SqueezeNet classifies by a convolution


@functools.cache
def _of_timm(name: str) -> _Design:
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"network 'timm:{name}' needs timm, which is not installed: pip install 'camri-tune[timm]'")
    import timm  # noqa: PLC0415 - an extra, and only where it is asked for

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        wanted: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # what follows the dot is no set of weights
        raise InputError(f"network 'timm:{name}' is not one of timm's: {reason_of(error)}") from None

    def build(side: int) -> nn.Module:
        options: dict[str, Any] = {"img_size": side} if wanted.fixed_input_size else {}
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
        return network

    return _Design(build, wanted.input_size[-1], wanted.mean, wanted.std)


def _unknown(library: str, name: str, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["resnet18"]
    return InputError(f"{library} has no classifier {name!r}: give {library}:NAME, such as {', '.join(near)}")

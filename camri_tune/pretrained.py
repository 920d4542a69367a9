"""Weights to start from: a file of somebody's training, and what of it a network can take."""

import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from camri_tune.backbones import without_memory
from camri_tune.config import StudyConfig, printable
from camri_tune.errors import InputError
from camri_tune.models import build_body, freeze, trunk

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep weights among other things
MOST_WRAPPINGS = 5  # one in the other
_MOST_NAMED = 4


@dataclass(frozen=True)
class Start:
    """What a network's training starts from: weights by their names in the network, and what to tell of them."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    text: str = ""


def starting_weights(config: StudyConfig, *, channels: int, image_size: int) -> Start:
    """Check that the study's network can be built and trained as it says, and read the weights that it starts from.

    Raises InputError where there is no such network, where it does not take such images, where it has fewer parts than
    are to be trained, or where `config.weights` cannot be read or has nothing of it.
    """
    with torch.random.fork_rng(devices=[]), without_memory(config.model):
        body = build_body(config.model, channels=channels, image_size=image_size)
    freeze(body, config.trainable)
    if config.weights is None:
        return Start()
    return _matched(_read(config.weights), trunk(body), config)


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name. No code in it is executed."""
    if not path.is_file():
        raise InputError(f"--weights {str(path)!r} is not a file; give a .safetensors file, or a .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_compressed(path):
            raise ValueError("it is compressed, which torch.save does not do")
        with warnings.catch_warnings(action="ignore"):
            stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch has one of its own for nearly every way in which bytes can be no weights
        reason = printable(" ".join(str(error).split()), 160)
        raise InputError(
            f"--weights {str(path)!r} cannot be read as weights alone, which execute nothing ({reason}); save the "
            f"network's state_dict() and give that file"
        ) from None
    for _ in range(MOST_WRAPPINGS):  # one may hold itself
        if not _is_table(stored):
            break
        stored = next((stored[key] for key in _WRAPPERS if _is_table(stored.get(key))), stored)
    if not isinstance(stored, Mapping):
        raise InputError(f"--weights {str(path)!r} holds {type(stored).__name__}, not weights by their names")
    return {name: tensor for name, tensor in stored.items() if isinstance(name, str) and _is_plain(tensor)}


def _is_compressed(path: Path) -> bool:
    """Whether reading the file could take many times its size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _matched(stored: Mapping[str, Tensor], network: nn.Module, config: StudyConfig) -> Start:
    """What of `stored` has a name and a shape of the network's, below the prefix where most does."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    parts = [name.split(".") for name in stored]
    prefixes = {"".join(f"{part}." for part in some[:depth]) for some in parts for depth in range(min(len(some), 4))}

    def fitting(prefix: str) -> list[str]:
        return [n for n, shape in wanted.items() if f"{prefix}{n}" in stored and stored[f"{prefix}{n}"].shape == shape]

    # Of several that fit as well, as of a network and its moving mean, always the same.
    prefix = max(sorted(prefixes, key=lambda some: (len(some), some)), key=lambda some: len(fitting(some)), default="")
    found = fitting(prefix)
    parameters = dict(network.named_parameters())
    if not any(name in parameters for name in found):
        raise InputError(
            f"--weights {str(config.weights)!r} has nothing of network {config.model!r}: it holds "
            f"{_some(stored) or 'no tensors'}, the network {_some(wanted)}; give weights of this network"
        )
    # Counters of batches are missing from old files, and nothing depends on them.
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    left_out = stored.keys() - {f"{prefix}{name}" for name in found}
    below = f" ({prefix}*)" if prefix else ""
    text = f"Starts from {config.weights}{below}: {len(found)} of the network's {len(wanted)} tensors are in it"
    if missing:
        text += f"; not in it, or of another shape, and so random: {_some(missing)}"
    if left_out:
        text += f"; left out: {_some(sorted(left_out))}"
    return Start({name: stored[f"{prefix}{name}"] for name in found}, f"{printable(text, 1_000)}.")


def _some(names: Collection[str]) -> str:
    shown = [printable(name, 60) for name in list(names)[:_MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")

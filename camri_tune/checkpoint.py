"""The state of a training after an epoch, in memory and as a file, from which it goes on to the same result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from camri_tune.optimizers import FusedOptimizer

_MODEL, _OPTIMIZER = "model.", "optimizer."
_ORDER, _GLOBAL, _CUDA = "rng.order", "rng.global", "rng.cuda"
_NOTE = "camri_tune"  # in the file's metadata: what is no tensor, as JSON


@dataclass(frozen=True)
class TrainingState:
    """Weights, the optimizer's moments and every random generator after `epoch` epochs, as tensors on the CPU."""

    epoch: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, epoch: int, model: nn.Module, optimizer: FusedOptimizer, rng: torch.Generator, device: torch.device
    ) -> Self:
        """A copy of the present state."""
        tensors = {f"{_MODEL}{name}": _copy(tensor) for name, tensor in model.state_dict().items()}
        for place, parameter in enumerate(optimizer.parameters):
            for name, value in optimizer.state[parameter].items():
                tensors[f"{_OPTIMIZER}{place}.{name}"] = _copy(value)
        tensors |= {_ORDER: rng.get_state(), _GLOBAL: torch.get_rng_state()}
        if device.type == "cuda":
            tensors[_CUDA] = torch.cuda.get_rng_state(device)
        return cls(epoch, tensors)

    def restore(self, model: nn.Module, optimizer: FusedOptimizer, rng: torch.Generator, device: torch.device) -> None:
        """Put a new training of the same settings into this state."""
        model.load_state_dict(self.weights)
        for place, parameter in enumerate(optimizer.parameters):
            prefix = f"{_OPTIMIZER}{place}."
            # Moments lie in memory as their weights do (channels_last): the fused step walks through both alike.
            optimizer.state[parameter] = {
                key.removeprefix(prefix): torch.empty_like(parameter).copy_(value)
                if value.shape == parameter.shape
                else value.to(device, copy=True)  # what is trained on counts its steps in it
                for key, value in self.tensors.items()
                if key.startswith(prefix)
            }
        rng.set_state(self.tensors[_ORDER])
        torch.set_rng_state(self.tensors[_GLOBAL])
        if _CUDA in self.tensors and device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors[_CUDA], device)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's `state_dict`."""
        return {k.removeprefix(_MODEL): v for k, v in self.tensors.items() if k.startswith(_MODEL)}

    def save(self, path: Path, note: Mapping[str, Any]) -> None:
        """Write a safetensors file that also holds `note`, which must be JSON."""
        text = json.dumps({"epoch": self.epoch, "note": note})
        save_file(dict(self.tensors), path, metadata={_NOTE: text})

    @classmethod
    def load(cls, path: Path) -> tuple[Self, Any] | None:
        """What `save` wrote, and its note; None where the file is another's."""
        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads(file.metadata()[_NOTE])
                state = cls(int(stored["epoch"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        return state, stored["note"]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()

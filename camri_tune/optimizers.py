"""SGD, Adam and AdamW by PyTorch's fused kernels, to the last bit what its own classes compute.

Those import its compiler when the first of them is made: a second or three in which nothing is trained.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

_EPSILON = 1e-8


@dataclass
class Group:
    """Parameters that are moved alike.

    `rate` is what a step takes, `factor` times the learning rate; a tensor on a GPU, where a recorded step reads it
    (see recording.py). What is `orthogonal` is for Muon to move.
    """

    parameters: Sequence[Tensor]
    rate: float | Tensor
    factor: float = 1.0
    weight_decay: float = 0.0
    orthogonal: bool = False

    def set_rate(self, learning_rate: float) -> None:
        """Take `factor` times this from now on; a tensor keeps its place."""
        if isinstance(self.rate, Tensor):
            self.rate.fill_(learning_rate * self.factor)
        else:
            self.rate = learning_rate * self.factor


class FusedOptimizer(ABC):
    """What moves the parameters of `groups` by their gradients; `state` is what it keeps of each, by name."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group.parameters]

    def clear_gradients(self) -> None:
        """Forget all gradients, and free their memory."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move each parameter that has a gradient."""
        for group in self.groups:
            moved = [(p, p.grad) for p in group.parameters if p.grad is not None]
            if moved:
                parameters, gradients = (list(part) for part in zip(*moved, strict=True))
                self._move(group, parameters, gradients)

    @abstractmethod
    def _move(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None: ...

    def _kept(self, name: str, parameters: Sequence[Tensor], *, number: bool = False) -> list[Tensor]:
        """What is kept of each parameter under this name, zeros at first: as large as it is, or one `number`."""
        for p in parameters:
            if name not in self.state[p]:
                # On the device, too: a recorded step counts there. The kernels count in float32 alone.
                kept = torch.zeros((), dtype=torch.float32, device=p.device) if number else torch.zeros_like(p)
                self.state[p][name] = kept
        return [self.state[p][name] for p in parameters]


class SGD(FusedOptimizer):
    """Stochastic gradient descent with Nesterov's momentum."""

    def __init__(self, groups: Sequence[Group], momentum: float = 0.9) -> None:
        super().__init__(groups)
        self._momentum = momentum

    def _move(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        sgd(
            parameters,
            gradients,
            [*self._kept("momentum", parameters)],  # a list that may hold None, to the checker of types
            lr=group.rate,
            weight_decay=group.weight_decay,
            momentum=self._momentum,
            nesterov=True,
            dampening=0.0,
            maximize=False,
            fused=True,
        )


class Adam(FusedOptimizer):
    """Adam (Kingma and Ba, 2015), whose weight decay is a part of the gradient."""

    decoupled = False

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(groups)
        self._betas = betas

    def _move(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        adam(
            parameters,
            gradients,
            self._kept("mean", parameters),
            self._kept("square", parameters),
            [],
            self._kept("steps", parameters, number=True),
            lr=group.rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            eps=_EPSILON,
            weight_decay=group.weight_decay,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            maximize=False,
            fused=True,
        )


class AdamW(Adam):
    """Adam whose weight decay is a step of its own (Loshchilov and Hutter, 2019)."""

    decoupled = True

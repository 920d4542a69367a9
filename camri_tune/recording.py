"""A step of training on a GPU as one piece of work, a CUDA graph, that is recorded once and then replayed.

A small network's step is some 350 kernels, most of which take a GPU less time than the host takes to launch them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_BEFORE = 3  # calls as they are: libraries choose their algorithms in the first, and optimizers make their state


class Recorded:
    """`step` on a GPU, called with tensors of the same shapes and types each time.

    It must do the same work each time and read nothing back to the host. What else it reads and what it makes must
    stay where it is in memory: weights, the optimizer's state and learning rate, sums. Random numbers of the GPU are
    new ones in each replay.
    """

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        self._calls += 1
        if self._calls <= _BEFORE:
            # On the stream that is recorded later: what a step leaves behind belongs to the stream it was made on.
            present = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(present)
            with torch.cuda.stream(self._stream):
                self._step(*inputs)
            present.wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            self._inputs = tuple(tensor.clone() for tensor in inputs)
            # Another thread's call to CUDA is none of this recording's business.
            recording = torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.device(self._stream.device), recording:
                self._step(*self._inputs)
        for kept, tensor in zip(self._inputs, inputs, strict=True):
            kept.copy_(tensor)
        self._graph.replay()

"""Networks. A `Classifier` takes uint8 images, or embeddings, and gives logits; normalisation is part of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from camri_tune.backbones import Backbone, build_backbone
from camri_tune.config import HEAD, Model
from camri_tune.errors import InputError
from camri_tune.losses import Head


class ContrastNormalisation(nn.Module):
    """Each image (C, H, W) to zero mean and unit contrast, whatever the light it was taken in.

    GTSRB's frames run from glare to night: without this the same network loses accuracy on them. Takes uint8 or float
    images of range 0 to 255.
    """

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        x = x - x.mean((1, 2, 3), keepdim=True)
        # Of centred images the norm is the standard deviation, in a twentieth of the time of torch.std on a CPU.
        deviation = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) / math.sqrt(x[0].numel() - 1)
        # The constant keeps a nearly blank image from becoming amplified noise.
        normalised: Tensor = x / (deviation + 0.03 * 255)
        return normalised


class _Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU four values share a random number of 64 bits, which is where its time goes.

    The probability is rounded to 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.empty_like(x)
        torch.ge(draws, round(self.p * 2**16) - 2**15, out=kept)
        return x * kept.div_(1 - self.p)


def _block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, pool: nn.Module | None = None
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)
    # The largest of four is the same before ReLU as after it, and a quarter as many values are left to it.
    pooled = [] if pool is None else [pool]
    return [convolution, nn.BatchNorm2d(outputs), *pooled, nn.ReLU()]


class CompactCNN(nn.Module):
    """Five convolutions to a batch-normalised embedding (N, 128); 0.44 M parameters for 32x32 RGB.

    Each image's light and contrast are evened out first. Images (N, C, S, S) of any side from 8 pixels are brought to a
    4x4 map; the first halving is a strided 4x4 convolution, since full resolution is where a small network spends most
    of its time.
    """

    embedding_size = 128
    repeats_itself = True  # the same work in each training step, nothing read back to the host (see recording.py)

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        self.normalise = ContrastNormalisation()
        # Small images have fewer halvings to give: the stem's goes first, then the last pool's.
        stem = _block(channels, 32, 4, 2) if image_size >= 24 else _block(channels, 32)
        last_pool: nn.Module = nn.MaxPool2d(2) if image_size in (16, 32) else nn.AdaptiveMaxPool2d(4)
        self.features = nn.Sequential(
            *stem,
            *_block(32, 64),
            *_block(64, 64, pool=nn.MaxPool2d(2)),
            nn.Dropout2d(0.1),
            *_block(64, 128),
            *_block(128, 96, pool=last_pool),
            nn.Dropout2d(0.1),
        )
        self.embed = nn.Sequential(
            nn.Flatten(),
            _Dropout(0.3),
            nn.Linear(96 * 16, self.embedding_size, bias=False),
            nn.BatchNorm1d(self.embedding_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(_channels_last(self.normalise(images)))
        if maps.requires_grad:
            # Flattened, they come back as NCHW, which makes the pool's way back twice as slow.
            maps.register_hook(_channels_last)
        features: Tensor = self.embed(maps)
        return features


class WideCNN(nn.Module):
    """Seven convolutions of 3x3 to a batch-normalised embedding (N, 256); 2.0 M parameters. What a GPU has time for.

    A narrow layer at full resolution, then three pairs of wider ones, halved after the first of each: the shape that
    Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), found good. Images (N, C, S, S) of any side from 8
    pixels, each image's light and contrast evened out first.
    """

    embedding_size = 256
    repeats_itself = True

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        self.normalise = ContrastNormalisation()
        pairs = [(32, 64), (64, 256), (256, self.embedding_size)]
        layers = _block(channels, 32)
        for inputs, outputs in pairs:
            # Pooled first: normalisation, which takes a GPU long, then has a quarter of the values.
            first, *rest = _block(inputs, outputs)
            layers += [first, nn.MaxPool2d(2), *rest, *_block(outputs, outputs)]
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.embed = nn.BatchNorm1d(self.embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(self.features(_channels_last(self.normalise(images))))
        return features


class PaperCNN(nn.Module):
    """The CAMRI authors' network for CIFAR-10: 13 convolutions of 3x3 with ReLU to an embedding (N, 512).

    Images (N, C, S, S) of any side from 8 pixels, scaled to [0, 1] and not normalised otherwise. Batch normalisation
    follows the ReLU where it stands, as in their code.
    """

    embedding_size = 512
    repeats_itself = True

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        # Numbers are convolutions of so many channels, B is batch normalisation, P halves and drops out a quarter.
        plan = "64 64 B 64 P 128 128 B 128 P 256 256 B 256 256 256 B 512 512"
        for step in plan.split():
            if step == "B":
                layers.append(nn.BatchNorm2d(inputs))
            elif step == "P":
                layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
            else:
                layers += [nn.Conv2d(inputs, int(step), 3, padding=1), nn.ReLU(inplace=True)]
                inputs = int(step)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        dense = nn.Linear(inputs, self.embedding_size)
        nn.init.kaiming_normal_(dense.weight)
        self.embed = nn.Sequential(dense, nn.BatchNorm1d(self.embedding_size))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(self.features(_channels_last(images.float() / 255)))
        return features


class Standardised(nn.Module):
    """No network: embeddings (N, D), or (N, D, 1, 1), each of their numbers centred and scaled over the training part.

    A learning rate, a scale and a margin then mean the same whatever network the embeddings are of. A number that is
    the same in all of the training part counts nowhere: any other value of it would be thousands of deviations off.
    """

    repeats_itself = False  # the host computes what a batch weighs among the statistics

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        self.embedding_size = channels
        # Without momentum the statistics are those of all batches, not of the last ten.
        self.normalise = nn.BatchNorm1d(channels, eps=1e-8, momentum=None, affine=False)
        # A variance does not tell what is constant: its rounding grows with the batch.
        self.register_buffer("lowest", torch.full((channels,), math.inf))
        self.register_buffer("highest", torch.full((channels,), -math.inf))
        self.lowest: Tensor
        self.highest: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        numbers = embeddings.float().flatten(1)
        standardised: Tensor = self.normalise(numbers)
        if self.training:
            found = numbers.detach().aminmax(dim=0)
            self.lowest.copy_(torch.minimum(self.lowest, found.min))
            self.highest.copy_(torch.maximum(self.highest, found.max))
            return standardised
        return standardised * (self.lowest != self.highest)


Body = CompactCNN | WideCNN | PaperCNN | Standardised | Backbone
_BODIES: dict[Model, type[CompactCNN] | type[WideCNN] | type[PaperCNN] | type[Standardised]] = {
    "compact": CompactCNN,
    "wide": WideCNN,
    "paper-cnn": PaperCNN,
    HEAD: Standardised,
}


class Classifier(nn.Module):
    """Images, or embeddings, to logits: network with its own normalisation, head without margin. What is exported.

    `logit_bias` maps class index to what is added to that class's logit (see posthoc.py).
    """

    def __init__(self, body: Body, head: Head, logit_bias: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.logit_bias = dict(logit_bias or {})

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of uint8 or float images (N, C, S, S) of range 0 to 255, or of embeddings (N, D)."""
        embeddings: Tensor = self.body(images)
        return embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.embed(images))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C) of embeddings (N, D)."""
        logits = self.head.get_logits(embeddings)
        for c, bias in self.logit_bias.items():
            logits[:, c] += bias
        return logits


def build_body(name: Model, *, channels: int, image_size: int) -> Body:
    """The network called `name`, freshly initialised from torch's global generator, in channels_last where it can be.

    Raises InputError where a library has none of that name, or where it does not take such images.
    """
    body: Body
    if name in _BODIES:
        body = _BODIES[name](channels, image_size)
    else:
        body = build_backbone(name, channels=channels, image_size=image_size)
    if any(tensor.ndim == 5 for tensor in body.state_dict().values()):  # of volumes, which have another such format
        return body
    return body.to(memory_format=torch.channels_last)


def trunk(body: Body) -> nn.Module:
    """The network itself, whose weights have the names that others know them by."""
    return body.network if isinstance(body, Backbone) else body


def parts_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network in the order in which it lists them, from its input on.

    They are its children that have parameters; one that has more than half of all parameters counts by its own children
    instead: the blocks of a transformer, the stages of a ResNet and the blocks of its largest.
    """
    parts, half = _children(network), _count(network) / 2
    while large := [part for part in parts if _count(part) > half and _children(part)]:
        place = parts.index(large[0])
        parts[place : place + 1] = _children(large[0])
    return parts


def freeze(body: Body, trainable: str) -> list[nn.Module]:
    """Keep the parameters from training that `trainable` does not name (`all`, `head`, `last:N`: see `parts_of`).

    Returns the modules that they are in, which belong in evaluation mode: batch normalisation keeps its statistics
    there, and nothing is dropped out. Raises InputError where the network has fewer parts.
    """
    if trainable == "all":
        return []
    parts = parts_of(trunk(body))
    count = 0 if trainable == "head" else int(trainable.removeprefix("last:"))
    if count > len(parts):
        raise InputError(
            f"--trainable {trainable} asks for parts that the network lacks: give last:1 to last:{len(parts)}, or all"
        )
    body.requires_grad_(False)
    free: set[nn.Module] = set()
    for part in parts[len(parts) - count :]:
        part.requires_grad_(True)
        free |= set(part.modules())
    return [module for module in body.modules() if module not in free]


def _children(network: nn.Module) -> list[nn.Module]:
    return [child for child in network.children() if _count(child)]


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)

"""Networks. A `Classifier` takes uint8 images and gives logits; contrast normalisation is part of it."""

import torch
from torch import Tensor, nn

from camri_tune.losses import Head

EMBEDDING_SIZE = 128


class ContrastNormalisation(nn.Module):
    """Each image (C, H, W) to zero mean and unit contrast, whatever the light it was taken in.

    GTSRB's frames run from glare to night: without this the same network loses accuracy on them. Takes uint8 or float
    images of range 0 to 255.
    """

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        mean = x.mean((1, 2, 3), keepdim=True)
        # The constant keeps a nearly blank image from becoming amplified noise.
        return (x - mean) / (x.std((1, 2, 3), keepdim=True) + 0.03)


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class CompactCNN(nn.Module):
    """Five convolutions to a batch-normalised embedding (N, 128); 0.44 M parameters for 32x32 RGB.

    Images (N, C, S, S) of any side from 8 pixels are brought to a 4x4 map; the first halving is a strided 4x4
    convolution, since full resolution is where a small network spends most of its time.
    """

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        # Small images have fewer halvings to give: the stem's goes first, then the last pool's.
        stem = _block(channels, 32, 4, 2) if image_size >= 24 else _block(channels, 32)
        last_pool: nn.Module = nn.MaxPool2d(2) if image_size in (16, 32) else nn.AdaptiveMaxPool2d(4)
        self.features = nn.Sequential(
            *stem,
            *_block(32, 64),
            *_block(64, 64),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.1),
            *_block(64, 128),
            *_block(128, 96),
            last_pool,
            nn.Dropout2d(0.1),
        )
        self.embed = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96 * 16, EMBEDDING_SIZE, bias=False),
            nn.BatchNorm1d(EMBEDDING_SIZE),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(self.features(images))
        return features


class Classifier(nn.Module):
    """Images to logits: contrast normalisation, network, head without margin. This is what is exported."""

    def __init__(self, body: nn.Module, head: Head) -> None:
        super().__init__()
        self.normalise = ContrastNormalisation()
        self.body = body
        self.head = head

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of uint8 images (N, C, S, S)."""
        embeddings: Tensor = self.body(self.normalise(images).contiguous(memory_format=torch.channels_last))
        return embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.head.get_logits(self.embed(images))


def build_body(name: str, *, channels: int, image_size: int) -> nn.Module:
    """The network called `name`, freshly initialised from torch's global generator, in channels_last."""
    bodies = {"compact": CompactCNN}
    return bodies[name](channels, image_size).to(memory_format=torch.channels_last)

"""Losses and networks whose embedding is a plane: what Figures 2 and 3 of the CAMRI paper measure and draw.

Three class weights 120 degrees apart give the loss of a sample wherever its feature lies; a network with a 2-D
embedding gives the directions of real images about the class weights.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from camri_tune.errors import TrainingDivergedError
from camri_tune.images import Images
from camri_tune.losses import CrossEntropyLoss, CRWWCELoss, Head, WeightedCrossEntropyLoss
from camri_tune.models import CompactCNN
from camri_tune.training import EVALUATION_BATCH, HeadSpec, Recipe, has_fast_bfloat16, schedule_of

FloatArray = NDArray[np.float64]

IMPORTANT, OTHER = 0, 1  # of the three classes
WEIGHT_ANGLES = np.radians([90.0, 210.0, 330.0])  # of their weights: up, down to the left, down to the right
HALF_WIDTH = 6.0  # of the plane that is mapped; the class weights have length 1
PLANE_SCALE = 4.0  # of the cosine losses: at 16 the tie is in the same place, all other contours squeezed onto it
CIRCLE = np.radians(np.arange(0, 360, 0.1))

BATCH, LEARNING_RATE, WEIGHT_DECAY, BETAS = 128, 5e-3, 0.02, (0.9, 0.99)
WARMUP = 0.2  # of all steps


def plane_specs(margin: float) -> dict[str, HeadSpec]:
    """Figure 2's losses by title, on three classes of which the first is important; `margin` in radians."""
    return {
        "CE": HeadSpec("ce"),
        "WCE (w = 3)": HeadSpec("wce", weights={IMPORTANT: 3.0}),
        "CRWWCE (3 and 1)": HeadSpec("crwwce", weights={IMPORTANT: 3.0}, w_fp={IMPORTANT: 1.0}),
        "L2 (NormFace)": HeadSpec("l2", PLANE_SCALE),
        "ArcFace": HeadSpec("arcface", PLANE_SCALE, {IMPORTANT: margin}),
        "CAMRI": HeadSpec("camri", PLANE_SCALE, {IMPORTANT: margin}),
    }


def plane_head(spec: HeadSpec) -> Head:
    """The head of `spec` for three classes, with weights of length 1, 120 degrees apart, and no bias."""
    return with_weights_at(spec.build(3, 2), WEIGHT_ANGLES).requires_grad_(False)


def loss_at(head: Head, points: Tensor, label: int) -> Tensor:
    """The training loss (N,) of single samples of class `label` with embeddings `points` (N, D)."""
    labels = torch.full((len(points),), label)
    losses: Tensor = torch.vmap(lambda point, y: head(point[None], y[None]))(points, labels)
    return losses


def tie_loss(head: Head, label: int) -> float:
    """What the loss is where it gives the label and one rival half of the probability each."""
    price = 1.0
    if isinstance(head, WeightedCrossEntropyLoss):
        price = float(head.weights[label])
    elif isinstance(head, CRWWCELoss):
        price = float(head.w_fn[label] + head.w_fp[label, label - 1])
    return price * math.log(2)


def half_angle_below_tie(head: Head, label: int) -> float:
    """Half of the angle, in degrees, in which the loss is below its tie, on the circle of radius HALF_WIDTH."""
    below = loss_at(head, HALF_WIDTH * directions(CIRCLE), label) < tie_loss(head, label)
    return 180 * float(below.float().mean())


def decision_angles(head: Head) -> FloatArray:
    """The angles in radians (B,) at which inference goes from one class to the next, for a head without a bias."""
    with torch.no_grad():
        decided = head.get_logits(directions(CIRCLE)).argmax(dim=1).numpy()
    found: FloatArray = CIRCLE[decided != np.roll(decided, 1)] - math.radians(0.05)
    return found


def directions(angles: FloatArray) -> Tensor:
    """Unit vectors (N, 2), float32, of angles in radians."""
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1), dtype=torch.float32)


def class_weights(head: Head) -> Tensor:
    """The class weights (C, D) of either kind of head."""
    return head.dense.weight if isinstance(head, CrossEntropyLoss) else head.weight


def with_weights_at(head: Head, angles: FloatArray) -> Head:
    """`head`, its class weights of length 1 at `angles` (radians) and without bias from now on."""
    with torch.no_grad():
        class_weights(head).copy_(directions(angles))
        if isinstance(head, CrossEntropyLoss):
            head.dense.bias.zero_()
    return head


@dataclass(frozen=True)
class Spread:
    """One network on test images. Angles, in degrees, are between an image's feature and its own class's weight."""

    accuracy: float
    recall: float  # of the important class, as are precision and the first three angles
    precision: float
    images: int
    important_images: int
    angle_mean: float
    angle_median: float
    angle_95: float  # 95 % are nearer to their weight
    others_angle_mean: float
    nearest_weight: float  # from the important class's weight to the nearest other


@dataclass(frozen=True)
class Panel:
    """A trained network seen on images: unit `features` (N, 2) and `weights` (C, 2), `labels` and `called` (N,)."""

    head: Head
    features: FloatArray
    weights: FloatArray
    labels: NDArray[np.int64]
    called: NDArray[np.int64]

    def angles(self) -> FloatArray:
        """Degrees (N,) between each feature and the weight of its own class."""
        return _degrees((self.features * self.weights[self.labels]).sum(axis=1))

    def spread(self, important: int) -> Spread:
        """The figures of class `important`."""
        own, right, angles = self.labels == important, self.labels == self.called, self.angles()
        calls = right[self.called == important]
        rivals = np.delete(self.weights, important, axis=0)
        return Spread(
            accuracy=float(right.mean()),
            recall=float(right[own].mean()),
            precision=float(calls.mean()) if len(calls) else 0.0,
            images=len(right),
            important_images=int(own.sum()),
            angle_mean=float(angles[own].mean()),
            angle_median=float(np.median(angles[own])),
            angle_95=float(np.percentile(angles[own], 95)),
            others_angle_mean=float(angles[~own].mean()),
            nearest_weight=float(_degrees(rivals @ self.weights[important]).min()),
        )


def train_plane(
    spec: HeadSpec, images: Images, *, num_classes: int, epochs: int, seed: int, device: torch.device
) -> tuple[nn.Module, Head]:
    """Train the compact network with a 2-D bottleneck: images to features (N, 2), and the head for them.

    The class weights start evenly around the circle. Started at random, two of them often end up in one place, for in a
    plane no class can move past its neighbour: test accuracy was 0.88 instead of 0.94 (MNIST, 20,000 images, 4 epochs,
    one seed). Raises TrainingDivergedError when the loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights, dropout, order of the images
        compact = CompactCNN(images.channels, images.side)
        # Batch normalisation comes last, so that features lie all around the origin.
        bottleneck = (nn.PReLU(), nn.Linear(compact.embedding_size, 2, bias=False), nn.BatchNorm1d(2, affine=False))
        body = nn.Sequential(compact, *bottleneck).to(memory_format=torch.channels_last).to(device)
        around = np.linspace(0, 2 * math.pi, num_classes, endpoint=False)
        head = with_weights_at(spec.build(num_classes, 2), around).to(device)
        parameters = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        batch = min(BATCH, len(images))
        steps = len(images) // batch
        factor = schedule_of(steps * epochs, Recipe(epochs, LEARNING_RATE, warmup=WARMUP))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for epoch in range(1, epochs + 1):
            for rows in torch.randperm(len(images))[: steps * batch].view(steps, batch):
                pixels, labels = images.batch(rows)
                with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
                    features = body(pixels.to(device))
                loss = head(features, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if not torch.isfinite(loss):
                raise TrainingDivergedError(f"the loss in the plane became {float(loss)} in epoch {epoch} with {spec}")
    return body, head


@torch.no_grad()
def see(body: nn.Module, head: Head, images: Images, device: torch.device) -> Panel:
    """A trained network on `images`, without margin or label."""
    body.eval()
    embeddings = torch.cat([body(part.to(device)) for part in images.split(EVALUATION_BATCH)])
    called = head.get_logits(embeddings).argmax(dim=1).cpu().numpy()
    features, weights = (F.normalize(t.double()).cpu().numpy() for t in (embeddings, class_weights(head)))
    return Panel(head.cpu(), features, weights, images.labels.numpy(), called)


def _degrees(cosine: FloatArray) -> FloatArray:
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))

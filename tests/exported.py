"""An exported model made by hand: a network with weights and running statistics of its own, never trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camri_tune.bundle import BundleConfig, ModelSpec, save_weights, write_bundle
from camri_tune.config import HEAD
from camri_tune.losses import NormFaceLoss
from camri_tune.models import Classifier, build_body

CLASSES = ("go", "stop", "=1+1")


def make_bundle(
    folder: Path,
    *,
    model: str = "compact",
    channels: int = 3,
    side: int = 8,
    classes: Sequence[str] = CLASSES,
    important: tuple[int, ...] = (1,),
    dataset: str = "nowhere",
    fingerprint: str = "0123456789abcdef",
    **spec: Any,
) -> Path:
    """Write a bundle of a cosine head into `folder`, which is returned; `spec` are more values of its ModelSpec.

    Of model `head` it takes embeddings of so many `channels`.
    """
    torch.manual_seed(3)
    side = 1 if model == HEAD else side
    body = build_body(model, channels=channels, image_size=side)
    classifier = Classifier(body, NormFaceLoss(len(classes), body.embedding_size, 12.5))
    with torch.no_grad():
        if model == HEAD:
            classifier.embed(3 * torch.randn(64, channels) + 1)
        else:
            classifier.embed(torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8))
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = folder.parent / f"weights-of-{folder.name}"
    save_weights(classifier.state_dict(), weights)
    config = BundleConfig(
        schema=1,
        spec=ModelSpec(
            model=model,
            channels=channels,
            image_size=side,
            classes=tuple(classes),
            head="cosine",
            scale=12.5,
            **spec,
        ),
        important=important,
        dataset=dataset,
        dataset_fingerprint=fingerprint,
        seed=7,
        skip_corrupt=False,
    )
    write_bundle(folder, weights=weights, config=config, metrics={"verdict": "certified"}, card="# Card\n")
    weights.unlink()
    return folder

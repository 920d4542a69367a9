"""An exported model on disk: weights as safetensors, the rest as JSON. Reading one never executes code from it."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from camri_tune.config import Model
from camri_tune.errors import BundleError
from camri_tune.files import sha256
from camri_tune.losses import CrossEntropyLoss, Head, NormFaceLoss
from camri_tune.models import Classifier, build_body

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"


class ModelSpec(BaseModel):
    """All that inference needs beside the weights. `scale` belongs to a cosine head; `logit_bias` is by class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Model
    channels: int = Field(ge=1, le=64)
    image_size: int = Field(ge=8, le=512)
    classes: tuple[str, ...] = Field(min_length=2)
    head: Literal["dense", "cosine"]
    scale: float | None = Field(None, gt=0, allow_inf_nan=False)
    logit_bias: dict[int, FiniteFloat] = Field(default_factory=dict)

    @field_validator("logit_bias")
    @classmethod
    def _biased_are_classes(cls, value: dict[int, float], info: ValidationInfo) -> dict[int, float]:
        count = len(info.data.get("classes", ()))
        if not all(0 <= c < count for c in value):
            raise ValueError(f"must name indices from 0 to {count - 1}")
        return value


class BundleConfig(BaseModel):
    """`config.json`: the model, and where its study's data came from, so that the test part can be found again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = Field(1, alias="schema")
    spec: ModelSpec
    important: tuple[int, ...]
    dataset: str
    dataset_fingerprint: str
    seed: int
    skip_corrupt: bool
    weights_sha256: str = ""  # filled in when the bundle is written
    input: str = (
        "uint8 RGB (or one channel) images, whole image resized to image_size x image_size with bilinear antialiasing; "
        "normalisation is part of the model"
    )

    @field_validator("important")
    @classmethod
    def _important_are_classes(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        classes = info.data["spec"].classes if "spec" in info.data else ()
        if classes and not all(0 <= c < len(classes) for c in value):
            raise ValueError(f"must be indices from 0 to {len(classes) - 1}")
        return value


class Bundle:
    """A loaded bundle: `classifier` in evaluation mode on the CPU, its `config` and its stored `metrics`."""

    def __init__(self, classifier: Classifier, config: BundleConfig, metrics: Mapping[str, Any]) -> None:
        self.classifier = classifier
        self.config = config
        self.metrics = metrics

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.spec.classes


def save_weights(classifier: Classifier, path: Path) -> None:
    """Write the weights alone. There is no margin among them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(state, path)


def load_classifier(path: Path, spec: ModelSpec) -> Classifier:
    """Rebuild a classifier from its spec and weights. Raises BundleError where they do not fit each other."""
    body = build_body(spec.model, channels=spec.channels, image_size=spec.image_size)
    head: Head
    if spec.head == "dense":
        head = CrossEntropyLoss(len(spec.classes), body.embedding_size)
    else:
        if spec.scale is None:
            raise BundleError(f"{path.parent / CONFIG} has a cosine head without its scale; export the model again")
        head = NormFaceLoss(len(spec.classes), body.embedding_size, spec.scale)
    classifier = Classifier(body, head, spec.logit_bias)
    try:
        classifier.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"weights {str(path)!r} cannot be read for this model ({reason}); export them again"
        ) from None
    return classifier.eval()


def write_bundle(folder: Path, *, weights: Path, config: BundleConfig, metrics: Mapping[str, Any], card: str) -> None:
    """Write a bundle whole or not at all: under a temporary name beside `folder`, then renamed over it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private; a bundle is as readable as what stands around it
        shutil.copyfile(weights, partial / WEIGHTS)
        config = config.model_copy(update={"weights_sha256": sha256(partial / WEIGHTS)})
        (partial / CONFIG).write_text(config.model_dump_json(indent=2, by_alias=True) + "\n")
        (partial / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        (partial / CARD).write_text(card)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle that `write_bundle` wrote. Raises BundleError, naming what is missing or wrong."""
    for name in (WEIGHTS, CONFIG, METRICS):
        if not (folder / name).is_file():
            raise BundleError(
                f"{str(folder)!r} is not an exported model: it has no {name}; give a folder such as runs/NAME/best"
            )
    try:
        config = BundleConfig.model_validate_json((folder / CONFIG).read_text())
        metrics = json.loads((folder / METRICS).read_text())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise BundleError(f"{folder / CONFIG}: {key}: {first['msg']}; export the model again") from None
    except (ValueError, OSError) as error:
        raise BundleError(f"{str(folder)!r} cannot be read ({error}); export the model again") from None
    if not isinstance(metrics, dict):
        raise BundleError(
            f"{folder / METRICS} must hold an object, not {type(metrics).__name__}; export the model again"
        )
    classifier = load_classifier(folder / WEIGHTS, config.spec)
    if sha256(folder / WEIGHTS) != config.weights_sha256:
        raise BundleError(f"{folder / WEIGHTS} was altered after it was written; export the model again")
    return Bundle(classifier, config, metrics)

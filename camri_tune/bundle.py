"""An exported model on disk: weights as safetensors, the rest as JSON.

A bundle may come from anybody. Reading one executes no code from it, opens nothing outside its folder, builds nothing
larger than its weights, and lets nothing through that could act on a terminal.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from camri_tune.arrays import MOST_NUMBERS
from camri_tune.backbones import without_memory
from camri_tune.calibration import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from camri_tune.config import HEAD, MOST_PATTERN, Model, is_own_model, is_printable, printable, require_model_name
from camri_tune.errors import BundleError, InputError
from camri_tune.files import sha256
from camri_tune.folders import is_class_name
from camri_tune.losses import CrossEntropyLoss, Head, NormFaceLoss
from camri_tune.models import Classifier, build_body
from camri_tune.own_networks import allow, identified

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"
MOST_JSON = 2**26  # bytes; figures of 1,000 classes over 10 seeds take 8 million
MOST_CHANNELS = 64  # of images
MOST_HEADER = 2**20  # bytes of the list of tensors; ours take 4,000
# Of parameters float32 alone; whoever writes a network may keep other things beside them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
IMAGES = (
    "uint8 RGB (or one channel) images, whole image resized to image_size x image_size with bilinear antialiasing; "
    "normalisation is part of the model"
)
EMBEDDINGS = "float32 embeddings of the network that the training part's are of; normalisation is part of the model"
MOST_BIAS = 1e6  # beyond, nothing but the bias would decide, and float32 ends somewhere


class ModelSpec(BaseModel):
    """All that inference needs beside the weights. `scale` belongs to a cosine head; `logit_bias` is by class.

    The class is decided by logits with the bias, a rule that raises recall; probabilities are the softmax of the logits
    without it over `temperature`. Without a temperature nobody has fitted them, and they are scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Model
    channels: int = Field(ge=1, le=MOST_NUMBERS)
    image_size: int = Field(ge=1, le=512)
    classes: tuple[str, ...] = Field(min_length=2)
    head: Literal["dense", "cosine"]
    scale: float | None = Field(None, gt=0, allow_inf_nan=False)
    logit_bias: dict[int, FiniteFloat] = Field(default_factory=dict)
    temperature: float | None = Field(None, ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)

    @field_validator("model")
    @classmethod
    def _model_can_be_named(cls, value: str) -> str:
        return require_model_name(value)

    @field_validator("image_size")
    @classmethod
    def _images_have_a_size(cls, value: int, info: ValidationInfo) -> int:
        channels, is_head = info.data.get("channels", 1), info.data.get("model") == HEAD
        if value != 1 if is_head else value < 8 or channels > MOST_CHANNELS:
            raise ValueError(f"must be 1 for --model {HEAD}, else from 8, of at most {MOST_CHANNELS} channels")
        return value

    @property
    def are_embeddings(self) -> bool:
        """Whether it takes embeddings (N, `channels`) in the place of images."""
        return self.model == HEAD

    @field_validator("classes")
    @classmethod
    def _classes_have_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [name for name in value if not is_class_name(name)]:
            raise ValueError(f"must be names as a folder can have, without control characters, which {odd[0]!r} is not")
        if len(set(value)) < len(value):
            raise ValueError("must differ from each other")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biased_are_classes(cls, value: dict[int, float], info: ValidationInfo) -> dict[int, float]:
        count = len(info.data.get("classes", ()))
        if not all(0 <= c < count for c in value):
            raise ValueError(f"must name indices from 0 to {count - 1}")
        if any(abs(bias) > MOST_BIAS for bias in value.values()):
            raise ValueError(f"must be biases of at most {MOST_BIAS:g}, as logits are")
        return value


class BundleConfig(BaseModel):
    """`config.json`: the model, and where its study's data came from, so that the test part can be found again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = Field(1, alias="schema")
    spec: ModelSpec
    important: tuple[int, ...] = Field(min_length=1)
    dataset: str = Field(min_length=1, max_length=4096)
    dataset_fingerprint: str
    seed: int = Field(ge=0, lt=2**31)
    group_by: str | None = Field(None, min_length=1, max_length=MOST_PATTERN)
    skip_corrupt: bool
    weights_sha256: str = ""  # filled in when the bundle is written
    input: str = IMAGES
    network: str = ""  # of the user's own: what its code was (see own_networks.identified)

    @field_validator("important")
    @classmethod
    def _important_are_classes(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        classes = info.data["spec"].classes if "spec" in info.data else ()
        if classes and not all(0 <= c < len(classes) for c in value):
            raise ValueError(f"must be indices from 0 to {len(classes) - 1}")
        if len(set(value)) < len(value):
            raise ValueError("must differ from each other")
        return value

    @field_validator("dataset", "group_by")
    @classmethod
    def _text_is_printable(cls, value: str | None) -> str | None:
        if value is not None and not is_printable(value):
            raise ValueError("must have no control characters")
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


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a classifier's `state_dict` alone. There is no margin in it."""
    # Copies: modules may share a parameter, and safetensors takes none that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    save_file(copies, path)


def load_classifier(path: Path, spec: ModelSpec) -> Classifier:
    """Rebuild a classifier from its spec and weights. Raises BundleError where they do not fit each other.

    They are compared before it takes any memory: a spec can ask for more than there is.
    """
    if spec.head == "cosine" and spec.scale is None:
        raise BundleError(f"{str(path.parent / CONFIG)!r} has a cosine head without its scale; export the model again")
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then replaced
            with without_memory(spec.model):
                expected = _build(spec).state_dict()
            if reason := _why_unfit(path, expected):
                raise BundleError(f"weights {str(path)!r} are not this model's ({reason}); export them again")
            classifier = _build(spec)  # not from the one without memory: libraries' networks hold more than weights
        classifier.load_state_dict(load_file(path))
    except BundleError:
        raise
    except InputError as error:  # no such network here
        raise BundleError(f"{str(path.parent / CONFIG)!r}: {error}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split()))
        raise BundleError(
            f"weights {str(path)!r} cannot be read for this model ({reason}); export them again"
        ) from None
    return classifier.eval()


def _build(spec: ModelSpec) -> Classifier:
    body = build_body(spec.model, channels=spec.channels, image_size=spec.image_size)
    head: Head
    if spec.scale is None or spec.head == "dense":
        head = CrossEntropyLoss(len(spec.classes), body.embedding_size)
    else:
        head = NormFaceLoss(len(spec.classes), body.embedding_size, spec.scale)
    return Classifier(body, head, spec.logit_bias)


def _why_unfit(path: Path, expected: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the tensors that a file of weights lists, none of which is read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        return f"its list of tensors is {length:,} bytes long, but at most {MOST_HEADER:,} are read"
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        for name, tensor in expected.items():
            if name not in found:
                return f"they lack {name!r}"
            dtype, shape = found[name].get_dtype(), found[name].get_shape()
            kind = _DTYPES.get(tensor.dtype, str(tensor.dtype))
            if (dtype, shape) != (kind, [*tensor.shape]):
                needed = f"{kind} {[*tensor.shape]}"
                return printable(f"{name!r} is {dtype} {shape}, but the model has {needed}")
        if more := found.keys() - expected.keys():
            return printable(f"the model has no {min(more)!r}")
    return None


def write_bundle(folder: Path, *, weights: Path, config: BundleConfig, metrics: Mapping[str, Any], card: str) -> None:
    """Write a bundle whole or not at all: under a temporary name beside `folder`, then renamed over it.

    Only a bundle is replaced, also one that lost files, or a link, which is removed with what it leads to left alone.
    Raises BundleError where anything else is in the way, which a study file from elsewhere could have aimed at.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder) and not (folder.is_symlink() or _is_bundle(folder)):
        raise BundleError(f"{str(folder)!r} is in the way of the exported model, and is none itself; move it elsewhere")
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    partial = scratch / "new"
    try:
        partial.mkdir(mode=0o755)
        shutil.copyfile(weights, partial / WEIGHTS)
        config = config.model_copy(update={"weights_sha256": sha256(partial / WEIGHTS)})
        (partial / CONFIG).write_text(config.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
        (partial / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        if os.path.lexists(folder):
            os.replace(folder, scratch / "old")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_bundle(folder: Path) -> bool:
    """Whether a folder is one of ours, whole or not: others, too, have a model.safetensors and a config.json."""
    try:
        names = set(os.listdir(folder))
    except OSError:  # a file, or a folder that may not be read
        return False
    try:
        stored = json.loads(_content(folder / CONFIG))
    except (BundleError, ValueError, RecursionError):  # gone, or damaged
        return METRICS in names and names <= {WEIGHTS, CONFIG, METRICS, CARD}
    return isinstance(stored, dict) and "weights_sha256" in stored


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle that `write_bundle` wrote. Raises BundleError, naming what is missing or wrong.

    The folder may be a link; its files must lie in it.
    """
    for name in (WEIGHTS, CONFIG, METRICS):
        if not os.path.isfile(folder / name):
            raise BundleError(
                f"{str(folder)!r} is not an exported model: it has no file {name}; give a folder such as runs/NAME/best"
            )
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"{str(folder / name)!r} is a link that leads out of the exported model; put the file itself there"
            )
    config_path, metrics_path = folder / CONFIG, folder / METRICS
    try:
        config = BundleConfig.model_validate_json(_content(config_path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        raise BundleError(f"{str(config_path)!r}: {printable(reason)}; export the model again") from None
    try:
        metrics = json.loads(_content(metrics_path), parse_constant=_no_number, parse_int=_whole_number)
    except RecursionError:
        raise BundleError(f"{str(metrics_path)!r} is nested too deeply; export the model again") from None
    except ValueError as error:
        raise BundleError(
            f"{str(metrics_path)!r} cannot be read ({printable(str(error))}); export the model again"
        ) from None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("test", {}), dict):
        raise BundleError(
            f"{str(metrics_path)!r} must hold an object, and an object for its 'test'; export the model again"
        )
    _require_same_network(config, config_path)
    classifier = load_classifier(folder / WEIGHTS, config.spec)
    if sha256(folder / WEIGHTS) != config.weights_sha256:
        raise BundleError(f"{str(folder / WEIGHTS)!r} was altered after it was written; export the model again")
    return Bundle(classifier, config, metrics)


def _require_same_network(config: BundleConfig, path: Path) -> None:
    """Of the user's own the weights alone do not tell: an activation has none."""
    if not is_own_model(config.spec.model):
        return
    try:
        here = identified(config.spec.model)
    except InputError as error:  # it may not be imported, or cannot be
        raise BundleError(f"{str(path)!r}: {error}") from None
    if config.network not in ("", here):
        raise BundleError(
            f"{str(path)!r}: the model is of network {printable(config.network, 300)}, but here it is {here}: bring "
            f"the same file"
        )


def load(folder: str | os.PathLike[str], *, model: Model | None = None) -> nn.Module:
    """The model of a bundle as a plain module, in evaluation mode on the CPU. Raises BundleError.

    It takes uint8 images (N, C, S, S) of the size in `config.json`, or float32 embeddings (N, D), normalises them
    itself, and gives logits (N, classes); the class is their argmax. They include the bias of `--calibrate`, if any,
    which is in no probability: take `logit_bias` of `config.json` off before the softmax. A network of your own is only
    imported where `model` names it, as in `--model package.module:factory`.

    >>> import camri_tune, torch
    >>> model = camri_tune.load("runs/digits-camri-worst1/best")
    >>> images = torch.zeros((2, 1, 8, 8), dtype=torch.uint8)
    >>> model(images).shape
    torch.Size([2, 10])
    """
    allow(model)
    return read_bundle(Path(folder)).classifier


def read_card(folder: Path) -> str:
    """The model card of a bundle that was read; empty where it has none of its own."""
    path = folder / CARD
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return ""
    return _content(path).decode(errors="replace")


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_JSON + 1)
    except OSError as error:
        raise BundleError(f"{str(path)!r} cannot be read ({error.strerror}); export the model again") from None
    if len(content) > MOST_JSON:
        raise BundleError(f"{str(path)!r} is longer than {MOST_JSON:,} bytes, which no exported model's is")
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _whole_number(digits: str) -> int:
    if len(digits) > 20:  # more than 64 bits, which no figure has and no float may be able to hold
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)

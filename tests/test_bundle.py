"""An exported model: what is written is what is read, and what is damaged or hostile is refused in one line."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from camri_tune.bundle import (
    CARD,
    CONFIG,
    METRICS,
    WEIGHTS,
    Bundle,
    BundleConfig,
    ModelSpec,
    load_classifier,
    read_bundle,
    save_weights,
    write_bundle,
)
from camri_tune.config import Loss, Model
from camri_tune.errors import BundleError
from camri_tune.models import Classifier, build_body
from camri_tune.training import HeadSpec, predict_logits

CLASSES = ("go", "stop", "überholen verboten")
SIDE = 8
DENSE: tuple[Loss, ...] = ("ce", "wce", "crwwce")


def _spec(**values: Any) -> ModelSpec:
    usual = {"model": "compact", "channels": 1, "image_size": SIDE, "classes": CLASSES, "head": "cosine", "scale": 12.5}
    return ModelSpec(**{**usual, **values})


def _config(**values: Any) -> BundleConfig:
    usual = {
        "schema": 1,
        "spec": _spec(),
        "important": (1,),
        "dataset": "digits",
        "dataset_fingerprint": "0123456789abcdef",
        "seed": 7,
        "skip_corrupt": False,
    }
    return BundleConfig(**{**usual, **values})


def _classifier(loss: Loss = "camri", channels: int = 1, side: int = SIDE, model: Model = "compact") -> Classifier:
    """A network with weights and running statistics of its own."""
    torch.manual_seed(3)
    body = build_body(model, channels=channels, image_size=side)
    head = HeadSpec(loss, scale=12.5, margins={1: 0.3}, weights={1: 4.0}, w_fp={1: 0.5})
    classifier = Classifier(body, head.build(len(CLASSES), body.embedding_size))
    with torch.no_grad():
        classifier.embed(torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8))
    return classifier.eval()


def _write(folder: Path, classifier: Classifier, config: BundleConfig, metrics: Any = None) -> None:
    weights = folder.parent / "weights-of-a-trial"
    save_weights(classifier.state_dict(), weights)
    write_bundle(folder, weights=weights, config=config, metrics=metrics or {"verdict": "certified"}, card="# Card\n")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A good bundle on disk."""
    folder = tmp_path / "runs" / "best"
    folder.parent.mkdir()
    _write(folder, _classifier(), _config())
    return folder


def _refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as raised:
        read_bundle(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "channels", "side", "model"),
    [
        ("ce", 1, 8, "compact"),
        ("wce", 3, 16, "compact"),
        ("crwwce", 1, 9, "compact"),
        ("camri", 1, 8, "compact"),
        ("camri", 3, 32, "compact"),
        ("l2", 3, 16, "compact"),
        ("arcface", 3, 24, "compact"),
        ("cosface-i", 3, 40, "compact"),
        ("crwwce", 1, 8, "paper-cnn"),
        ("camri", 3, 9, "paper-cnn"),
        ("camri", 1, 32, "torchvision:mobilenet_v3_small"),
        ("ce", 3, 24, "torchvision:squeezenet1_1"),
        ("camri", 3, 32, "timm:test_vit"),
        ("l2", 1, 16, "timm:test_resnet"),
    ],
)
def test_a_model_answers_bit_for_bit_as_it_did(
    loss: Loss, channels: int, side: int, model: Model, tmp_path: Path
) -> None:
    classifier = _classifier(loss, channels, side, model)
    head = {"head": "dense", "scale": None} if loss in DENSE else {}
    spec = _spec(model=model, channels=channels, image_size=side, **head)
    _write(tmp_path / "best", classifier, _config(spec=spec))
    read = read_bundle(tmp_path / "best")
    assert not read.classifier.training
    images = torch.randint(0, 256, (20, channels, side, side), dtype=torch.uint8)
    cpu = torch.device("cpu")
    logits = predict_logits(read.classifier, images, cpu)
    assert logits.shape == (20, 3)
    assert torch.equal(logits, predict_logits(classifier, images, cpu))


def test_all_that_was_written_is_read(bundle: Path) -> None:
    read = read_bundle(bundle)
    assert isinstance(read, Bundle)
    assert read.config.model_copy(update={"weights_sha256": ""}) == _config()
    assert read.classes == CLASSES
    assert read.metrics == {"verdict": "certified"}
    assert {path.name for path in bundle.iterdir()} == {WEIGHTS, CONFIG, METRICS, CARD}
    assert (bundle / CARD).read_text(encoding="utf-8") == "# Card\n"
    assert json.loads((bundle / CONFIG).read_text(encoding="utf-8"))["schema"] == 1


def test_a_bundle_from_before_temperatures_is_read_and_has_none(bundle: Path) -> None:
    _change(bundle, lambda v: v["spec"].pop("temperature"))
    assert read_bundle(bundle).config.spec.temperature is None


def test_to_read_a_bundle_imports_no_compiler(tmp_path: Path) -> None:
    """TorchDynamo takes longer to import than all the rest of a prediction."""
    spec = _spec(model="paper-cnn")
    _write(tmp_path / "best", _classifier(model="paper-cnn"), _config(spec=spec))
    code = f"import sys, camri_tune; camri_tune.load({str(tmp_path / 'best')!r}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_bundle_may_lie_anywhere(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_bundle(bundle).config
    bundle.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert read_bundle(Path("moved")).config == before


@pytest.mark.parametrize("loss", ["camri", "arcface", "cosface-i"])
def test_there_is_no_margin_among_the_weights(loss: Loss, tmp_path: Path) -> None:
    """Inference has none, so an exported model cannot even hold one."""
    save_weights(_classifier(loss).state_dict(), tmp_path / "margin")
    save_weights(_classifier("l2").state_dict(), tmp_path / "none")
    with safe_open(tmp_path / "margin", "pt") as margin, safe_open(tmp_path / "none", "pt") as none:
        names = set(margin.keys())
        assert names == set(none.keys())
    assert not [name for name in names if "margin" in name]
    assert "head.weight" in names


@pytest.mark.parametrize("loss", ["wce", "crwwce"])
def test_there_is_no_weight_of_the_loss_among_the_weights(loss: Loss, tmp_path: Path) -> None:
    save_weights(_classifier(loss).state_dict(), tmp_path / "weighted")
    save_weights(_classifier("ce").state_dict(), tmp_path / "plain")
    with safe_open(tmp_path / "weighted", "pt") as weighted, safe_open(tmp_path / "plain", "pt") as plain:
        assert set(weighted.keys()) == set(plain.keys())


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_new_bundle_replaces_the_whole_of_an_old_one(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("of the old one")
    _write(bundle, _classifier("ce"), _config(spec=_spec(head="dense", scale=None)), {"verdict": "feasible"})
    assert {path.name for path in bundle.iterdir()} == {WEIGHTS, CONFIG, METRICS, CARD}
    read = read_bundle(bundle)
    assert read.config.spec.head == "dense"
    assert read.metrics == {"verdict": "feasible"}
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["best", "weights-of-a-trial"]


@pytest.mark.parametrize("problem", ["metrics", "weights"])
def test_a_bundle_that_cannot_be_written_leaves_the_old_one(problem: str, bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    weights = bundle.parent / "weights-of-a-trial"
    metrics: dict[str, object] = {"verdict": "feasible"}
    if problem == "metrics":
        metrics["figure"] = object()  # no JSON
    else:
        weights = bundle.parent / "nowhere"
    with pytest.raises((TypeError, OSError)):
        write_bundle(bundle, weights=weights, config=_config(), metrics=metrics, card="")
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["best", "weights-of-a-trial"]


def test_a_bundle_is_as_readable_as_any_folder(bundle: Path) -> None:
    assert bundle.stat().st_mode & 0o555 == 0o555


# --- what is missing or damaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METRICS])
def test_a_missing_file_is_named(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert name in _refusal(bundle)


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        assert "not an exported model" in _refusal(tmp_path / name)


def _cut_short(content: bytes) -> bytes:
    return content[:-100]


def _cut_to_the_header(content: bytes) -> bytes:
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]


def _with_another_header(content: bytes) -> bytes:
    return content[:8] + b"#" * 40 + content[48:]


def _with_a_header_of_any_length(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


def _with_one_weight_changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0x40])


@pytest.mark.parametrize(
    "damage",
    [
        _cut_short,
        _cut_to_the_header,
        _with_another_header,
        _with_a_header_of_any_length,
        _with_one_weight_changed,
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"more",
        lambda content: b"not a tensor in sight\n" * 10,
    ],
    ids=["short", "header", "other-header", "endless", "one-weight", "empty", "zeros", "longer", "text"],
)
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], bundle: Path) -> None:
    path = bundle / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    assert WEIGHTS in _refusal(bundle)


class _Trap:
    """What a hostile pickle is made of: reading it calls a function of its choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_not_executed(how: str, bundle: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    if how == "pickle":
        (bundle / WEIGHTS).write_bytes(pickle.dumps(_Trap(sprung)))
    else:
        torch.save({"head.weight": _Trap(sprung)}, bundle / WEIGHTS)
    assert WEIGHTS in _refusal(bundle)
    assert not sprung.exists()
    with (bundle / WEIGHTS).open("rb") as file:  # the trap itself works
        if how == "pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert sprung.exists()


def test_weights_of_another_network_are_refused(bundle: Path) -> None:
    save_weights(_classifier("camri", channels=3).state_dict(), bundle / WEIGHTS)
    assert WEIGHTS in _refusal(bundle)
    save_weights(_classifier("ce").state_dict(), bundle / WEIGHTS)  # has a bias that a cosine head has not
    assert WEIGHTS in _refusal(bundle)
    save_weights(_classifier(model="paper-cnn").state_dict(), bundle / WEIGHTS)
    assert WEIGHTS in _refusal(bundle)


# --- config.json ------------------------------------------------------------------------------------------------------


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(values)
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda v: v.update(extra=1), "extra"),
        (lambda v: v["spec"].update(margin=0.3), "spec.margin"),
        (lambda v: v.update(schema=2), "schema"),
        (lambda v: v.pop("seed"), "seed"),
        (lambda v: v.update(seed="seven"), "seed"),
        (lambda v: v.update(important="stop"), "important"),
        (lambda v: v.pop("spec"), "spec"),
        *(
            (lambda v, name=name: v["spec"].update(model=name), "spec.model")
            for name in ("resnet", "os/x:system", "timm:hf-hub:a/b", "timm:local-dir:/tmp", "torchvision:", "timm:\n")
        ),
        (lambda v: v["spec"].update(model="os:system"), "network 'os:system' is code, which is not executed"),
        (lambda v: v["spec"].update(model="torchvision:list_models"), "no classifier"),
        (lambda v: v["spec"].update(model="timm:create_model"), "no classifier"),
        (lambda v: v["spec"].update(model="timm:resnet18.no_such_weights"), "timm:resnet18.no_such_weights"),
        (lambda v: v["spec"].update(model="torchvision:inception_v3"), "8 pixels"),
        (lambda v: v["spec"].update(channels="three"), "spec.channels"),
        (lambda v: v["spec"].update(channels=10**9), "spec.channels"),
        (lambda v: v["spec"].update(image_size=10**9), "spec.image_size"),
        (lambda v: v["spec"].update(classes=["one"]), "spec.classes"),
        (lambda v: v["spec"].update(classes=[1, 2, 3]), "spec.classes"),
        (lambda v: v["spec"].update(head="margin"), "spec.head"),
        (lambda v: v["spec"].update(logit_bias={"3": 1.0}), "spec.logit_bias"),
        (lambda v: v["spec"].update(logit_bias={"1": math.inf}), "spec.logit_bias"),
        (lambda v: v["spec"].update(logit_bias={"1": 1e300}), "spec.logit_bias"),
        (lambda v: v["spec"].update(scale=0), "spec.scale"),
        (lambda v: v["spec"].update(temperature=0), "spec.temperature"),
        (lambda v: v["spec"].update(temperature=1e-300), "spec.temperature"),
        (lambda v: v["spec"].update(temperature=1e300), "spec.temperature"),
        (lambda v: v["spec"].update(temperature=math.nan), "spec.temperature"),
        (lambda v: v["spec"].update(temperature="warm"), "spec.temperature"),
        (lambda v: v["spec"].update(scale=math.nan), "spec.scale"),
        (lambda v: v["spec"].update(scale=math.inf), "scale"),
        (lambda v: v["spec"].update(scale=None), "scale"),
        (lambda v: v.update(important=[3]), "important"),  # classes are 0 to 2
        (lambda v: v.update(important=[-1]), "important"),
    ],
)
def test_a_wrong_value_is_named(change: Callable[[dict[str, Any]], object], part: str, bundle: Path) -> None:
    _change(bundle, change)
    message = _refusal(bundle)
    assert part in message
    assert CONFIG in message


@pytest.mark.parametrize("count", [2, 4, 1000])
def test_another_number_of_classes_than_the_weights_have_is_refused(count: int, bundle: Path) -> None:
    _change(bundle, lambda v: v["spec"].update(classes=[f"class {index}" for index in range(count)]))
    message = _refusal(bundle)
    assert WEIGHTS in message
    assert "head.weight" in message, "the reason, not only that there is one"


@pytest.mark.parametrize("name", [CONFIG, METRICS])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"a": 1}{'])
def test_a_file_that_is_not_the_json_it_should_be_is_refused(name: str, content: bytes, bundle: Path) -> None:
    (bundle / name).write_bytes(content)
    assert _refusal(bundle)


def test_a_cosine_head_needs_its_scale(bundle: Path) -> None:
    with pytest.raises(BundleError, match="scale"):
        load_classifier(bundle / WEIGHTS, _spec(scale=None))

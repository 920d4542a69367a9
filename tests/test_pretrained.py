"""Training from somebody's weights: what of a file a network takes, what of the network changes, and how fast."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from camri_tune.config import StudyConfig, is_printable
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import InputError, StudyMismatchError
from camri_tune.evaluation import evaluate_bundle
from camri_tune.models import Classifier, build_body, freeze, parts_of, trunk
from camri_tune.pretrained import Start, _read, starting_weights
from camri_tune.storage import StudyStore
from camri_tune.training import HeadSpec, Recipe, Trained, _optimizer, train
from camri_tune.worker import _same_weights
from tests.command import assert_one_line_error, camri_tune, result_of
from tests.test_bundle import _Trap

MODEL, SIDE = "timm:test_resnet", 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(StudyConfig.build({"image_size": SIDE}))


def _network(seed: int = 1) -> nn.Module:
    """The whole of it, with a classifier."""
    torch.manual_seed(seed)
    import timm  # noqa: PLC0415

    network: nn.Module = timm.create_model(MODEL.removeprefix("timm:"), num_classes=7)
    return network


def _start(path: Path, model: str = MODEL) -> Start:
    config = StudyConfig.build({"model": model, "weights": path})
    return starting_weights(config, channels=1, image_size=SIDE)


def _refusal(path: Path, model: str = MODEL) -> str:
    with pytest.raises(InputError) as raised:
        _start(path, model)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"--weights {str(path)!r} ")
    return message


# --- what a file holds ------------------------------------------------------------------------------------------------


def test_a_wrapping_that_holds_itself_has_no_weights(tmp_path: Path) -> None:
    wrapping: dict[str, object] = {}
    wrapping["model"] = wrapping
    torch.save(wrapping, tmp_path / "weights.pth")
    assert _refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.backbone.{name}": tensor for name, tensor in state.items()}},
    ],
)
def test_weights_are_found_below_whatever_they_are_wrapped_in(
    wrapped: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    state = dict(_network().state_dict())
    torch.save(wrapped(state), tmp_path / "weights.pth")
    start = _start(tmp_path / "weights.pth")
    body = trunk(build_body(MODEL, channels=1, image_size=SIDE))
    assert set(start.weights) == set(body.state_dict()), "all of the network, and nothing of the classifier"
    assert all(torch.equal(tensor, state[name]) for name, tensor in start.weights.items())
    count = len(body.state_dict())
    assert f"{count} of the network's {count} tensors are in it; left out: " in start.text
    assert "fc.weight" in start.text
    assert "random" not in start.text


@pytest.mark.parametrize("names", [("student", "teacher"), ("encoder_q", "encoder_k"), ("b", "a")])
def test_of_two_networks_in_a_file_it_is_always_the_same(names: tuple[str, str], tmp_path: Path) -> None:
    """Not the one that a set of texts happens to have first, which changes from process to process."""
    state = dict(_network().state_dict())
    two = {f"{name}.{key}": tensor + place for place, name in enumerate(names) for key, tensor in state.items()}
    torch.save(two, tmp_path / "weights.pth")
    start = _start(tmp_path / "weights.pth")
    first = min(names)
    assert f"weights.pth ({first}.*): " in start.text
    assert all(torch.equal(tensor, two[f"{first}.{name}"]) for name, tensor in start.weights.items())


def test_safetensors_and_an_exported_model_of_ours_are_read(tmp_path: Path) -> None:
    body = build_body("compact", channels=1, image_size=SIDE)
    save_file(
        {f"body.{name}": tensor.contiguous() for name, tensor in body.state_dict().items()}, tmp_path / "a.safetensors"
    )
    start = _start(tmp_path / "a.safetensors", "compact")
    assert set(start.weights) == set(body.state_dict())
    assert "left out" not in start.text


def test_what_is_missing_or_of_another_shape_is_told(tmp_path: Path) -> None:
    state = dict(_network().state_dict())
    changed = next(name for name in state if name.endswith("conv1.weight"))
    state[changed] = state[changed][:, :1].clone()
    del state[gone := next(name for name in state if name.endswith("bn2.bias"))]
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]  # as in files from before there were any
    torch.save(state, tmp_path / "weights.pt")
    start = _start(tmp_path / "weights.pt")
    assert f"not in it, or of another shape, and so random: {changed}, {gone};" in start.text
    assert changed not in start.weights


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "weights.pt")
    message = _refusal(tmp_path / "weights.pt")
    assert "nothing of network 'timm:test_resnet'" in message
    assert "weight, bias" in message
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    assert "no tensors" in _refusal(tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all\n" * 9, b"\xff" * 100, b"PK\x03\x04" + bytes(60)])
def test_a_file_that_holds_none_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be read" in _refusal(tmp_path / name)


@given(
    place=st.integers(0, 10**6),
    new=st.binary(min_size=1, max_size=12),
    suffix=st.sampled_from([".pt", ".safetensors"]),
    old_format=st.booleans(),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_other_bytes_is_understood_or_refused(
    place: int, new: bytes, suffix: str, old_format: bool, tmp_path: Path
) -> None:
    refused: list[str] = []
    path, state = tmp_path / f"weights{suffix}", {"conv1.weight": torch.zeros(16, 3, 3, 3)}
    if suffix == ".pt":
        torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    else:
        save_file(state, path)
    content = path.read_bytes()
    place %= len(content)
    path.write_bytes(content[:place] + new + content[place + len(new) :])
    try:
        assert len(_read(path)) <= 1
    except InputError as error:
        refused.append(str(error))
    assert all(map(is_printable, refused))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.pt", Path("/dev/zero")):
        assert "not a file" in _refusal(path)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_file_that_would_execute_something_is_refused_and_does_not(how: str, tmp_path: Path) -> None:
    path, sprung = tmp_path / "weights.pt", tmp_path / "sprung"
    if how == "pickle":
        path.write_bytes(pickle.dumps(_Trap(sprung)))
    else:
        torch.save({"state_dict": _Trap(sprung)}, path)
    assert "execute nothing" in _refusal(path)
    assert not sprung.exists()


def test_a_file_that_would_grow_is_refused(tmp_path: Path) -> None:
    """PyTorch unpacks what is compressed, however large it becomes; it never compresses itself."""
    torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    assert "compressed" in _refusal(tmp_path / "bomb.pt")


def test_names_in_a_file_do_not_act_on_a_terminal(tmp_path: Path) -> None:
    state = {**_network().state_dict(), "\x1b[2J": torch.zeros(1), "a" * 10**5: torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pt")
    text = _start(tmp_path / "weights.pt").text
    assert text.isprintable()
    assert len(text) < 2_000


# --- what of the network changes --------------------------------------------------------------------------------------


def _trained(data: Dataset, start: Start | None = None, **recipe: object) -> Trained:
    return train(
        MODEL,
        HeadSpec("camri", 16.0, {3: 0.3}),
        data.train[np.arange(64)],
        data.validation[np.arange(20)],
        num_classes=10,
        recipe=Recipe(1, 1e-2, batch_size=32, **recipe),  # type: ignore[arg-type]
        seed=0,
        device=CPU,
        start=None if start is None else start.weights,
    )


def _state(trained: Trained) -> dict[str, Tensor]:
    return dict(trunk(trained.classifier.body).state_dict())


@pytest.fixture
def start(tmp_path: Path) -> Start:
    network = _network()
    with torch.no_grad():  # statistics that are not those of a new network
        network.train()(torch.rand(8, 3, SIDE, SIDE))
    torch.save(network.state_dict(), tmp_path / "start.pt")
    return _start(tmp_path / "start.pt")


def test_a_frozen_network_keeps_its_weights_and_its_statistics(digits: Dataset, start: Start) -> None:
    state = _state(_trained(digits, start, trainable="head"))
    assert all(torch.equal(state[name], tensor) for name, tensor in start.weights.items())
    changed = _state(_trained(digits, start))
    assert not any(torch.equal(changed[n], t) for n, t in start.weights.items() if n.endswith("running_mean"))


def test_the_last_parts_alone_change(digits: Dataset, start: Start) -> None:
    network = trunk(build_body(MODEL, channels=1, image_size=SIDE))
    last = parts_of(network)[-2:]
    free = {name for name, module in network.named_modules() if any(module in set(part.modules()) for part in last)}
    state = _state(_trained(digits, start, trainable="last:2"))
    for name, tensor in start.weights.items():
        assert torch.equal(state[name], tensor) == (name.rsplit(".", 1)[0] not in free), name
    assert free


@pytest.mark.parametrize("model", ["compact", "wide", "paper-cnn", MODEL, "timm:test_vit", "torchvision:resnet18"])
def test_parts_have_at_most_half_of_the_parameters_unless_they_are_one_layer(model: str) -> None:
    network = trunk(build_body(model, channels=1, image_size=32))
    parts = parts_of(network)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert len(parts) > 2
    assert sum(counts) <= sum(p.numel() for p in network.parameters())
    order = list(network.modules())
    assert [order.index(part) for part in parts] == sorted(order.index(part) for part in parts)
    for part, count in zip(parts, counts, strict=True):
        assert count <= sum(counts) / 2 or not list(part.children())


def test_more_parts_than_there_are_is_refused() -> None:
    config = StudyConfig.build({"model": MODEL, "trainable": "last:99"})
    with pytest.raises(InputError, match=r"^--trainable last:99 .* last:1 to last:\d+, or all$"):
        starting_weights(config, channels=1, image_size=SIDE)


def test_the_network_learns_at_a_fraction_of_the_heads_rate() -> None:
    body = build_body(MODEL, channels=1, image_size=SIDE)
    classifier = Classifier(body, HeadSpec("ce").build(10, body.embedding_size))
    optimizer = _optimizer(classifier, Recipe(1, 1e-3, backbone_lr=0.1), CPU)
    factors = {id(p): group.factor for group in optimizer.groups for p in group.parameters}
    assert all(factors[id(p)] == 0.1 for p in classifier.body.parameters())
    assert all(factors[id(p)] == 1.0 for p in classifier.head.parameters())
    decayed = {id(p) for group in optimizer.groups if group.weight_decay for p in group.parameters}
    assert decayed == {id(p) for p in classifier.parameters() if p.ndim > 1}
    freeze(body, "head")
    optimizer = _optimizer(classifier, Recipe(1, 1e-3), CPU)
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in classifier.head.parameters()}


def test_a_slower_network_moves_less(digits: Dataset, start: Start) -> None:
    def moved(**recipe: float) -> float:
        state = _state(_trained(digits, start, **recipe))
        return sum(float((state[n] - t).abs().sum()) for n, t in start.weights.items() if n.endswith("conv1.weight"))

    assert 0 < moved(backbone_lr=0.01) < moved() / 10


# --- a study's weights are part of what it is -------------------------------------------------------------------------


def test_a_study_goes_on_with_the_same_weights_alone(digits: Dataset, tmp_path: Path) -> None:
    """Wherever the file lies; workers elsewhere need it, too."""
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    torch.save(_network(1).state_dict(), first)
    torch.save(_network(2).state_dict(), second)
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")

    def create(**values: object) -> StudyStore:
        config = StudyConfig.build({"model": MODEL, "image_size": SIDE, "out": tmp_path, "name": "s", **values})
        config.folder.mkdir(exist_ok=True)
        return StudyStore.create(storage, config, digits)

    store = create(weights=first)
    assert _same_weights(store, first) == first
    moved = first.rename(tmp_path / "moved.pt")
    create(weights=moved)
    for values in ({"weights": second}, {}, {"weights": moved, "trainable": "head"}):
        with pytest.raises(StudyMismatchError, match=r"was started with (weights|trainable)"):
            create(**values)
    for here in (None, first, second):
        with pytest.raises(StudyMismatchError, match=r"SHA-256 is .*--weights"):
            _same_weights(store, here)
    storage.close()


def test_a_study_from_before_there_was_a_choice_goes_on(digits: Dataset, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    config = StudyConfig.build({"image_size": SIDE, "out": tmp_path, "name": "s"})
    config.folder.mkdir()
    store = StudyStore.create(storage, config, digits)
    old = {k: v for k, v in store.attributes["identity"].items() if k not in ("weights", "trainable", "backbone_lr")}
    store.set("identity", old)
    StudyStore.create(storage, config, digits)
    with pytest.raises(StudyMismatchError, match="trainable = 'all', not 'head'"):
        StudyStore.create(storage, config.model_copy(update={"trainable": "head"}), digits)
    storage.close()


# --- all of it, as a user has it --------------------------------------------------------------------------------------


def test_a_study_of_somebodys_network_and_recipe_exports_what_its_files_alone_rebuild(tmp_path: Path) -> None:
    """Fine-tuned, with numbers that are fixed and others that are searched; not resumed with other weights."""
    weights, other, study = (tmp_path / name for name in ("weights.pth", "other.pth", "study.toml"))
    torch.save({"state_dict": _network(1).state_dict()}, weights)
    torch.save(_network(2).state_dict(), other)
    study.write_text(
        f'''
model = "{MODEL}"
image_size = {SIDE}
trainable = "last:2"
backbone_lr = 0.5
learning_rate = 0.005
margin = 0.2
batch_size = [32, 64]
optimizer = ["adamw", "sgd"]
schedule = ["cosine", "linear"]
weight_decay = {{low = 1e-3, high = 1e-1, log = true}}
label_smoothing = 0.05
important = "3"
limit = 200
folds = 1
trials = 2
seeds = 1
epochs = 1
tolerance = 100
workers = 1
name = "mine"
'''
    )
    command = ("run", study, "--out", tmp_path, "--weights")
    done = camri_tune(*command, weights, "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    params = result["best"]["params"]
    numbers, words = {"learning_rate", "scale", "margin", "batch_size", "weight_decay"}, {"optimizer", "schedule"}
    assert set(params) == numbers | words
    assert (params["learning_rate"], params["margin"]) == (0.005, 0.2)
    assert params["batch_size"] in (32, 64)
    assert (params["optimizer"] in ("adamw", "sgd"), params["schedule"] in ("cosine", "linear")) == (True, True)
    for shown in (done.stderr, (tmp_path / "mine" / "best" / "README.md").read_text()):
        assert f"schedule {params['schedule']}" in shown.replace("schedule = ", "schedule ")
    assert "learning rate 0.005" in done.stderr, "the baseline's as well, and not tuned"
    assert f"Starts from {weights}" in done.stderr
    assert any("smoothed by 0.05, the baseline's as well" in notice for notice in result["notices"])
    figures = evaluate_bundle(tmp_path / "mine" / "best", None, data_dir=tmp_path)
    assert figures["matches_stored"]
    # The part that does not change is that of the file, in the exported model as well.
    exported = load_file(tmp_path / "mine" / "best" / "model.safetensors")
    state = _network(1).state_dict()
    kept = {name for name in state if torch.equal(exported.get(f"body.network.{name}", torch.empty(0)), state[name])}
    assert any(name.endswith("conv1.weight") for name in kept)
    assert any(name.endswith("running_mean") for name in kept)
    assert len(kept) < len(state) - 5
    assert_one_line_error(camri_tune(*command, other), "weights", "trials under both cannot be compared")

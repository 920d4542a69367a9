"""Networks of the user's own: built from what somebody named here, and from nobody else's word."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import camri_tune
from camri_tune import own_networks, pipeline
from camri_tune.backbones import build_backbone, default_image_size
from camri_tune.bundle import ModelSpec, load_classifier, read_bundle, save_weights
from camri_tune.config import StudyConfig, is_own_model, package_of, read_study_file, require_model_name
from camri_tune.database import open_storage
from camri_tune.datasets import open_dataset
from camri_tune.errors import BundleError, InputError, StudyMismatchError
from camri_tune.losses import CrossEntropyLoss
from camri_tune.models import Classifier, build_body
from camri_tune.own_networks import allow, allowed, factory_of, folder_of, identified
from camri_tune.pipeline import run
from camri_tune.storage import StudyStore, storage_url
from camri_tune.worker import work
from tests.command import assert_one_line_error, result_of
from tests.command import camri_tune as command
from tests.exported import make_bundle

Write = Callable[..., str]
_NUMBERS = count()

BODY = """
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module whose function `small` has this body into the current folder; returns the network's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_networks, "_allowed", set())
    monkeypatch.setattr(own_networks, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def writing(body: str = BODY, *, before_it: str = "") -> str:
        module = f"network_{next(_NUMBERS)}"
        imports = "from pathlib import Path\nimport torch\nfrom torch import nn\n"
        code = f"{imports}{before_it}\ndef small():{body}\nOTHER = 3\n"
        (tmp_path / f"{module}.py").write_text(code)
        return f"{module}:small"

    yield writing
    for module in set(sys.modules) - before:
        if module.startswith("network_"):
            del sys.modules[module]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mynet:small", "a.b.c_1:Net", "torchvision.models:resnet18", "_x:_y"])
def test_names_of_the_users_own(name: str) -> None:
    assert require_model_name(name) == name
    assert is_own_model(name)
    assert package_of(name) is None


@pytest.mark.parametrize(
    "name",
    ["mynet", "a b:c", "a:b:c", "a.:b", ":b", "a:", "a/b:c", "a:b()", "é:b", "a:b\n", "a" * 200 + ":b", "timm:A"],
)
def test_names_that_are_none(name: str) -> None:
    assert not is_own_model(name)
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        require_model_name(name)
    with pytest.raises(InputError, match=r"^--model is .*MODULE:FUNCTION"):
        allow(name)


# --- what they are built from -----------------------------------------------------------------------------------------


def test_a_network_comes_from_the_current_folder_and_is_the_same_for_a_seed(write: Write) -> None:
    name = write()
    allow(name)
    assert allowed(name) == name
    torch.manual_seed(1)
    first = build_backbone(name, channels=1, image_size=16)
    torch.manual_seed(1)
    again = build_backbone(name, channels=1, image_size=16)
    assert first.embedding_size == 64
    assert default_image_size(name) is None
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    found = first.eval()(images)
    assert found.shape == (2, 64)
    assert torch.equal(found, again.eval()(images))


@pytest.mark.parametrize(
    "said",
    [
        "net.mean, net.std, net.image_size = (0.5, 0.25, 0), torch.ones(3) / 2, 48",
        # Buffers and parameters, shaped as they are applied; height and width.
        "net.register_buffer('mean', torch.tensor([0.5, 0.25, 0]).view(1, 3, 1, 1)); net.image_size = (48, 48); "
        "net.std = nn.Parameter(torch.ones(3, 1, 1) / 2)",
    ],
)
def test_what_it_says_of_its_images_is_heeded(said: str, write: Write) -> None:
    name = write(BODY.replace("return", "net =") + f"    {said}\n    return net\n")
    allow(name)
    network = build_backbone(name, channels=3, image_size=16)
    assert network.mean.flatten().tolist() == [127.5, 63.75, 0]
    assert network.deviation.flatten().tolist() == [127.5] * 3
    assert default_image_size(name) == 48


def test_a_network_may_have_weights_of_volumes(write: Write) -> None:
    """They have no channels_last format, but another."""
    body = """
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
"""
    name = write(body)
    allow(name)
    body_of_it = build_body(name, channels=3, image_size=16)
    assert body_of_it(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 4)


def test_a_network_may_bring_weights_of_its_own(write: Write) -> None:
    """It is really built, not only its shapes, so that what its function reads or computes is there."""
    body = (
        BODY.replace("return", "net =")
        + "    nn.init.constant_(net[0].weight, net[0].bias.detach().abs().max().item() * 0 + 2.0)\n    return net\n"
    )
    name = write(body)
    allow(name)
    network = build_backbone(name, channels=3, image_size=16)
    assert (dict(network.named_parameters())["network.0.weight"] == 2).all()


def test_layers_may_share_parameters_and_keep_numbers_of_any_kind(write: Write, tmp_path: Path) -> None:
    """What is trained can be stored and read again: a study would notice only after all of its trainings."""
    body = """
    act = nn.PReLU()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for kind in (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.bool):
        net.register_buffer(f"kept_{str(kind).removeprefix('torch.')}", torch.ones(3, dtype=kind))
    return net
"""
    name = write(body)
    allow(name)
    spec = ModelSpec(model=name, channels=3, image_size=16, classes=("a", "b"), head="dense")
    classifier = Classifier(build_body(name, channels=3, image_size=16), CrossEntropyLoss(2, 8)).eval()
    save_weights(classifier.state_dict(), tmp_path / "w.safetensors")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(load_classifier(tmp_path / "w.safetensors", spec)(images), classifier(images))


def test_layers_may_take_their_size_from_their_input(write: Write) -> None:
    name = write("\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.LazyBatchNorm1d())\n")
    allow(name)
    network = build_backbone(name, channels=3, image_size=16)
    assert dict(network.named_parameters())["network.1.weight"].shape == (32, 768)
    assert network.training


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("\n    raise RuntimeError('no\\nweights')\n", "cannot be made .*RuntimeError: no weights"),
        ("\n    raise SystemExit('usage')\n", "cannot be made .*SystemExit: usage"),
        ("\n    return 3\n", "is int, but its function should return a torch.nn.Module"),
        ("\n    return nn.Flatten(0)\n", r"makes \(1536,\) of 2 images, but should make an embedding \(2, D\)"),
        ("\n    return nn.Conv2d(3, 8, 3)\n", r"makes \(2, 8, 14, 14\) of 2 images"),
        ("\n    return nn.Linear(7, 3)\n", "does not take images of 16 pixels a side .*give another --image-size$"),
        ("\n    net = nn.Flatten()\n    net.std = (1, 1)\n    return net\n", "has a std that is not three numbers"),
        ("\n    net = nn.Flatten()\n    net.std = (1, 0, 1)\n    return net\n", "has a std that is not three numbers"),
        (
            "\n    net = nn.Flatten()\n    net.mean = (124, 116, 104)\n    return net\n",
            "has a mean that is not three numbers from 0",
        ),
        ("\n    net = nn.Flatten()\n    net.mean = 'abc'\n    return net\n", "has a mean that is not three numbers"),
        ("\n    net = nn.Flatten()\n    net.image_size = 'x'\n    return net\n", "has an image_size that is not"),
    ],
)
def test_what_is_no_network_gets_one_line(body: str, reason: str, write: Write) -> None:
    name = write(body)
    allow(name)
    with pytest.raises(InputError, match=reason) as raised:
        build_backbone(name, channels=3, image_size=16)
    assert "\n" not in str(raised.value)


def test_the_file_that_the_function_is_from_counts(write: Write, tmp_path: Path) -> None:
    """As where a package's face hands it on."""
    inner = write()
    face = write(before_it=f"from {inner.partition(':')[0]} import small as other").replace("small", "other")
    allow(face)
    before = identified(face)
    path = tmp_path / f"{inner.partition(':')[0]}.py"
    path.write_text(path.read_text().replace("ReLU", "Tanh"))
    own_networks._imported.clear()  # as in another process
    assert identified(face) != before


def test_workers_import_it_from_where_the_run_did(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's folder is on its path, and not on that of the processes that it starts."""
    name = write()
    home = tmp_path / "scripts"
    (home / "inner").mkdir(parents=True)
    (tmp_path / f"{name.partition(':')[0]}.py").rename(home / f"{name.partition(':')[0]}.py")
    (home / "inner" / "network_in.py").write_text((home / f"{name.partition(':')[0]}.py").read_text())
    monkeypatch.syspath_prepend(home)
    for each in (name, "inner.network_in:small"):
        allow(each)
        assert folder_of(each) == str(home)
    sys.modules.pop("inner"), sys.modules.pop("inner.network_in")
    before, judge = identified(name), pipeline._judge

    def edited_meanwhile(*arguments: Any) -> Any:
        file = home / f"{name.partition(':')[0]}.py"
        file.write_text(file.read_text() + "# an afterthought\n")
        return judge(*arguments)

    monkeypatch.setattr(pipeline, "_judge", edited_meanwhile)
    config = StudyConfig(
        model=name, name="s", out=tmp_path, trials=1, epochs=1, seeds=1, limit=100, tolerance=100, important=("3",)
    )
    result = run(config)
    assert result.best is not None
    assert json.loads((Path(result.folder) / "best" / "config.json").read_text())["network"] == before


def test_what_is_not_there_gets_one_line(write: Write) -> None:
    name = write(before_it="raise ValueError('not\\nhere')")
    for wrong, reason in {
        "no_such_module:f": "cannot be imported .*No module named",
        name: "cannot be imported .*ValueError: not here",
        write(before_it="raise SystemExit(7)"): "cannot be imported .*SystemExit: 7",
        write().replace("small", "large"): "has no function 'large'",
        write().replace("small", "OTHER"): "has no function 'OTHER'",
    }.items():
        allow(wrong)
        with pytest.raises(InputError, match=reason) as raised:
            factory_of(wrong)
        assert "\n" not in str(raised.value)


# --- what nobody here has asked for is not imported -------------------------------------------------------------------


def _hostile(write: Write) -> str:
    return write(before_it="Path('executed').touch()")


def test_no_file_and_no_storage_has_code_imported(write: Write, tmp_path: Path) -> None:
    name = _hostile(write)
    (tmp_path / "study.toml").write_text(f'model = "{name}"\n')
    with pytest.raises(InputError, match=r"must not hold the network .* give --model network_"):
        read_study_file(tmp_path / "study.toml")
    assert_one_line_error(command("run", "study.toml"), "must not hold the network", "--model")

    config = StudyConfig.build({"name": "x", "out": tmp_path, "important": ["3"], "seeds": 1, "trials": 1})
    config.folder.mkdir()
    store = StudyStore.create(open_storage(storage_url(config)), config, open_dataset(config))
    store.sign()
    store.set("config", {**store.attributes["config"], "model": name})
    store.set("identity", {**store.attributes["identity"], "model": name})
    with pytest.raises(InputError, match="is code, which is not executed because a file or a storage names it"):
        work(storage_url=storage_url(config), name="x", device="cpu")
    assert_one_line_error(command("worker", "--study", "x", "--storage", storage_url(config)), "--model network_")
    for words in (["status", "x"], ["report", "x"]):
        command(*words, "--out", tmp_path)

    folder = make_bundle(tmp_path / "best")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"compact"', json.dumps(name)))
    with pytest.raises(BundleError, match=f"is code, .* give --model {name}"):
        read_bundle(folder)
    for words in (["evaluate", str(folder)], ["predict", str(folder), "x.png"], ["export", str(folder)]):
        done = command(*words)
        assert done.returncode == 2
        assert not (tmp_path / "executed").exists(), words
    assert not (tmp_path / "executed").exists()
    allow(name)
    with pytest.raises(BundleError):  # the weights are another network's
        read_bundle(folder)
    assert (tmp_path / "executed").exists(), "it would have worked"


def test_a_module_that_is_reloaded_is_another_network(write: Write, tmp_path: Path) -> None:
    """As a notebook's %autoreload does it. An edit alone is none: what is in memory is as it was."""
    name = write()
    place = name.partition(":")[0]
    path = tmp_path / f"{place}.py"
    allow(name)
    before = identified(name)
    path.write_text(path.read_text().replace("16", "24"))
    with pytest.raises(InputError, match=r"has changed since this process imported it; reload the module, or start"):
        identified(name)
    importlib.invalidate_caches()
    importlib.reload(sys.modules[place])
    assert identified(name) != before
    assert factory_of(name)()[0].out_channels == 24


# --- a study of one ---------------------------------------------------------------------------------------------------

SMALL = ["--epochs", "3", "--trials", "2", "--seeds", "1", "--finalists", "1", "--tolerance", "100", "--folds", "1"]


def test_from_a_function_to_an_exported_model(write: Write, tmp_path: Path) -> None:
    name = write()
    options = ["run", "--model", name, "--name", "own", *SMALL]
    done = command(*options, "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    best = tmp_path / "runs" / "own" / "best"
    assert name in (best / "README.md").read_text()

    assert_one_line_error(command("evaluate", best), "is code", f"--model {name}")
    again = json.loads(command("evaluate", best, "--model", name, "--json").stdout)
    assert again["matches_stored"]
    model = camri_tune.load(best, model=name)
    assert isinstance(model, nn.Module)
    exported = command("export", "own", "--format", "onnx", "--model", name)
    assert exported.returncode == 0, exported.stderr
    images = open_dataset(StudyConfig()).test().pixels[:50]
    session = onnxruntime.InferenceSession(str(best.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert session.run(None, {"images": images.numpy()})[1] == pytest.approx(model(images).numpy(), abs=1e-4)

    path = tmp_path / f"{name.partition(':')[0]}.py"
    path.write_text(path.read_text().replace("16", "24"))
    assert_one_line_error(command(*options), "was started with model = ", name)
    assert_one_line_error(command("evaluate", best, "--model", name), "the model is of network", "bring the same file")
    with pytest.raises(InputError, match="has changed since this process imported it; reload the module, or start"):
        identified(name)
    sys.modules.pop(name.partition(":")[0])  # as in another process
    own_networks._imported.clear()
    assert identified(name).startswith(f"{name} (")
    with pytest.raises(StudyMismatchError, match=r"is on network .* bring the same file"):
        work(storage_url=f"sqlite:///{best.parent / 'study.db'}", name="own", device="cpu", model=name)
    path.unlink()
    assert result["verdict"] != "none"

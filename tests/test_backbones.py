"""Networks of torchvision and timm: without their classifier, with their own normalisation, from their name alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import models

from camri_tune.backbones import Backbone, ShapesOnly, build_backbone, default_image_size, embedding_size
from camri_tune.config import StudyConfig
from camri_tune.datasets import open_dataset
from camri_tune.errors import InputError
from camri_tune.losses import CAMRILoss
from camri_tune.models import Classifier, build_body
from tests.conftest import MakeFolder

# One of each kind: dropout or layers before the classifier, several losses, a fixed size, a convolution that
# classifies, sizes that are computed with tensors.
TORCHVISION = {
    "alexnet": (64, 4096),
    "resnet18": (32, 512),
    "mobilenet_v3_small": (32, 1024),
    "convnext_tiny": (32, 768),
    "squeezenet1_1": (32, 512),
    "googlenet": (32, 1024),
    "inception_v3": (75, 2048),
    "regnet_y_400mf": (32, 440),
    "vit_b_32": (64, 768),
    "swin_t": (40, 768),
    "swin_v2_t": (64, 768),
    "maxvit_t": (224, 512),
    "densenet121": (32, 1024),
    "efficientnet_b0": (32, 1280),
    "efficientnet_v2_s": (32, 1280),
    "mnasnet0_5": (32, 1280),
    "mobilenet_v2": (32, 1280),
    "shufflenet_v2_x0_5": (32, 1024),
    "vgg11_bn": (32, 4096),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is built here, nothing is downloaded for it."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("name", TORCHVISION)
def test_any_classifier_of_torchvision_gives_embeddings(name: str) -> None:
    side, size = TORCHVISION[name]
    assert embedding_size(f"torchvision:{name}", 3, side) == size


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small", "vit_b_32"])
def test_the_embedding_is_what_the_classifier_was_applied_to(name: str) -> None:
    """Put back, the network's own last layer gives the network's own answers."""
    side, _ = TORCHVISION[name]
    options = {"image_size": side} if name.startswith("vit") else {}
    torch.manual_seed(0)
    whole = models.get_model_builder(name)(weights=None, **options).eval()
    torch.manual_seed(0)
    backbone = build_backbone(f"torchvision:{name}", channels=3, image_size=side).eval()
    last = [layer for layer in whole.modules() if isinstance(layer, nn.Linear)][-1]
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    scaled = images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    scaled /= torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        embeddings = backbone(images)
        torch.testing.assert_close(last(embeddings), whole(scaled), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_were_trained_on_another_scale_are_given_that(name: str) -> None:
    """Torchvision's own, with its weights, undo ImageNet's normalisation (`transform_input`)."""
    side, _ = TORCHVISION[name]
    backbone = build_backbone(f"torchvision:{name}", channels=3, image_size=side).eval()
    build = models.get_model_builder(name)
    whole = build(weights=None, aux_logits=False, init_weights=False, transform_input=True)
    whole.fc = nn.Identity()
    whole.load_state_dict(backbone.network.state_dict())
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    scaled = images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    scaled /= torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), whole.eval()(scaled), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_resnet.r160_in1k"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_timm_give_embeddings_in_training_and_after(name: str, channels: int) -> None:
    body = build_body(f"timm:{name}", channels=channels, image_size=32)
    assert isinstance(body, Backbone)
    classifier = Classifier(body, CAMRILoss(5, body.embedding_size, {1: 0.2}))
    images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    for mode in (True, False):
        classifier.train(mode)
        assert classifier.embed(images).shape == (2, body.embedding_size)
        assert classifier(images).isfinite().all()
    assert not [key for key in body.network.state_dict() if key.startswith(("head.fc", "fc", "classifier"))]


@pytest.mark.parametrize(("name", "mean"), [("timm:test_resnet", 0.5), ("torchvision:squeezenet1_1", None)])
def test_normalisation_is_the_networks_own(name: str, mean: float | None) -> None:
    """An image of the mean's colour is zero to the network; a grey one is the same in each of its channels."""
    body = build_body(name, channels=3, image_size=32)
    assert isinstance(body, Backbone)
    seen: list[torch.Tensor] = []
    body.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    body.eval()
    colour = torch.tensor([mean] * 3 if mean else [0.485, 0.456, 0.406])
    body((colour * 255)[None, :, None, None].expand(2, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(2, 3, 32, 32), rtol=0, atol=1e-5)
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(body(grey), body(grey.expand(-1, 3, -1, -1)))
    assert {"mean", "deviation"} <= set(body.state_dict()), "an exported model has them, whatever a later timm says"


def test_weights_are_their_seeds_alone() -> None:
    """Also where it is the first of its kind, whose size is still to be found out."""
    embedding_size.cache_clear()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_backbone("timm:test_vit", channels=3, image_size=32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_network_of_any_size_is_looked_at_without_memory() -> None:
    with ShapesOnly():
        network = models.regnet_y_128gf(weights=None)
    assert sum(p.numel() for p in network.parameters()) > 600_000_000
    assert {p.device.type for p in network.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "channels", "side", "part"),
    [
        ("torchvision:resnet19", 3, 32, "no classifier 'resnet19': give torchvision:NAME, such as resnet18"),
        ("torchvision:list_models", 3, 32, "no classifier 'list_models'"),
        ("torchvision:fasterrcnn_resnet50_fpn", 3, 32, "no classifier"),
        ("timm:nothing_like_it", 3, 32, "such as"),
        ("timm:test_resnet.nothing", 3, 32, "'timm:test_resnet.nothing'"),
        ("torchvision:inception_v3", 3, 32, "--image-size (it was made for 299)"),
        ("torchvision:vit_b_16", 3, 40, "40 pixels a side"),
        ("torchvision:efficientnet_b7", 4, 64, "1 or 3 channels, not of 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, channels: int, side: int, part: str) -> None:
    with pytest.raises(InputError) as raised:
        build_body(name, channels=channels, image_size=side)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_timm_its_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'camri-tune\[timm\]'"):
        default_image_size("timm:test_vit3")


def test_photographs_get_the_size_that_the_network_was_made_for(image_folder: MakeFolder) -> None:
    folder = image_folder({"cat": 8, "dog": 8})
    sizes = {
        model: open_dataset(StudyConfig.build({"dataset": str(folder), "model": model, **values})).image_size
        for model, values in (
            ("compact", {}),
            ("timm:test_resnet", {}),
            ("torchvision:efficientnet_b7", {}),
            ("torchvision:resnet18", {"image_size": 48}),
        )
    }
    assert list(sizes.values()) == [32, 160, 512, 48]
    assert open_dataset(StudyConfig.build({"model": "timm:test_resnet"})).image_size == 8, "the digits have their own"


def test_a_name_alone_imports_nothing() -> None:
    """Help and usage errors come at once, and the built-in networks wait for no library."""
    code = (
        "import sys; from camri_tune.config import StudyConfig; from camri_tune import worker;"
        "StudyConfig.build({'model': 'timm:resnet18'}); print('timm' in sys.modules, 'torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

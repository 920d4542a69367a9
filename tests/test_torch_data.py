"""Data sets from Python: what their items may be, and a study on one, which the command line goes on with."""

import doctest
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from camri_tune import StudyConfig, pipeline, run
from camri_tune.datasets import open_dataset
from camri_tune.errors import DataError, InputError, StudyMismatchError
from camri_tune.images import read_image
from camri_tune.sources import side_of
from camri_tune.storage import MARK
from camri_tune.torch_data import write_arrays
from tests.command import camri_tune, result_of

PIXELS = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))


class Items(Dataset[Any]):
    """What `make` gives for each index."""

    def __init__(self, make: Callable[[int], Any], count: int = 24) -> None:
        self._make = make
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def _write(
    path: Path, train: Dataset[Any], classes: Sequence[str] | None = None, side: int | None = None, **more: Dataset[Any]
) -> Path:
    parts: Any = {"train": train, **more}
    side_here = partial(side_of, StudyConfig(image_size=side))
    write_arrays(path, parts, classes=classes, side=side_here, on_progress=lambda done, total: None, in_use=True)
    return path


def _refusal(path: Path, train: Dataset[Any], **values: Any) -> str:
    with pytest.raises(InputError) as raised:
        _write(path, train, **values)
    assert list(path.parent.iterdir()) == []
    message = str(raised.value)
    assert "\n" not in message
    return message


def _stored(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "make",
    [
        lambda index: PIXELS[index],
        lambda index: PIXELS[index].float() / 255,
        lambda index: PIXELS[index].double() / 255,
        lambda index: PIXELS[index].permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda index: Image.fromarray(PIXELS[index].permute(1, 2, 0).numpy()),
    ],
    ids=["uint8", "float32", "float64", "other strides", "PIL"],
)
def test_images_of_every_kind_are_stored_as_they_are(make: Callable[[int], Any], tmp_path: Path) -> None:
    stored = _stored(_write(tmp_path / "x.npz", Items(lambda index: (make(index), index % 3))))
    assert np.array_equal(stored["images"], PIXELS.numpy())
    assert stored["labels"].tolist() == [index % 3 for index in range(24)]


def test_a_pil_image_is_what_a_file_of_it_is(tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([PIXELS[0].permute(1, 2, 0).numpy(), np.full((8, 8), 100, np.uint8)]))
    (tmp_path / "file").mkdir()
    image.save(tmp_path / "file" / "1.png")
    stored = _stored(_write(tmp_path / "x.npz", Items(lambda index: (image, index % 2))))
    assert np.array_equal(stored["images"][5], read_image(tmp_path / "file" / "1.png", 8))


def test_a_photograph_is_turned_as_its_file_would_be(tmp_path: Path) -> None:
    """A camera that was held upright says so beside the pixels, and `predict` heeds it."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:2] = 255
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "1.png", exif=tag)
    with Image.open(tmp_path / "1.png") as opened:
        image = opened.convert("RGB")
    stored = _stored(_write(tmp_path / "x.npz", Items(lambda index: (image, index % 2))))
    expected = read_image(tmp_path / "1.png", 8)
    assert np.array_equal(stored["images"][5], expected)
    assert not np.array_equal(expected, picture.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (lambda index: torch.tensor(index % 2), [0, 1]),
        (lambda index: torch.tensor([index % 2]), [0, 1]),
        (lambda index: np.int16(index % 2), [0, 1]),
        (lambda index: np.array([index % 2]), [0, 1]),
        (lambda index: "ab"[index % 2], ["a", "b"]),
        (lambda index: np.str_("ab"[index % 2]), ["a", "b"]),
    ],
)
def test_labels_of_every_kind(label: Callable[[int], Any], expected: list[Any], tmp_path: Path) -> None:
    stored = _stored(_write(tmp_path / "x.npz", Items(lambda index: (PIXELS[index], label(index)))))
    assert stored["labels"].tolist() == expected * 12


def test_parts_groups_and_names_of_classes(tmp_path: Path, own_cache: Path) -> None:
    train = Items(lambda index: (PIXELS[index], index % 2, f"object {index // 4}"), 16)
    test = Items(lambda index: [PIXELS[16 + index], index % 2, None], 8)
    path = _write(tmp_path / "x.npz", train, classes=["go", "stop"], test=test)
    data = open_dataset(StudyConfig(dataset=str(path)))
    assert data.classes == ("go", "stop")
    assert torch.equal(data.test().pixels, PIXELS[16:])
    assert sorted([len(torch.unique(data.train.groups)), len(torch.unique(data.validation.groups))]) == [1, 3]
    assert len(torch.unique(data.test().groups)) == 8


def test_images_of_many_sizes_are_resized(tmp_path: Path) -> None:
    train = Items(lambda index: (torch.zeros(1, 10 + index, 50), index % 2))
    assert _stored(_write(tmp_path / "x.npz", train))["images"].shape == (24, 1, 32, 32)
    assert _stored(_write(tmp_path / "y.npz", train, side=12))["images"].shape == (24, 1, 12, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embeddings_are_stored_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = _stored(_write(tmp_path / "x.npz", Items(lambda index: (NUMBERS[index].to(dtype), index % 3))))
    assert sorted(stored) == ["embeddings", "labels", "split"]
    assert stored["embeddings"].dtype == np.float32
    assert np.array_equal(stored["embeddings"], NUMBERS.to(dtype).float().numpy())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda index: PIXELS[index], ["item 0 of the train data set", "'Tensor'", "(image, label)"]),
        (lambda index: (PIXELS[index],), ["(image, label)"]),
        (lambda index: (PIXELS[index], 0, 0, 0), ["(image, label)"]),
        (lambda index: (PIXELS[index].numpy(), 0), ["the image of item 0", "'ndarray'", "a PIL image"]),
        (lambda index: (PIXELS[index][0], 0), ["'torch.uint8 (8, 8)'"]),
        (lambda index: (PIXELS[index].permute(1, 2, 0), 0), ["'torch.uint8 (8, 8, 3)'", "(C, H, W)"]),
        (lambda index: (PIXELS[index].int(), 0), ["torch.int32"]),
        (lambda index: (PIXELS[index].float(), 0), ["values from 0 to 25", "from 0 to 1"]),
        (lambda index: (torch.randn(3, 8, 8), 0), ["values from -", "normalisation"]),
        (lambda index: (torch.full((3, 8, 8), torch.nan), 0), ["from nan to nan"]),
        (lambda index: (Image.new("F", (8, 8)), 0), ["floating-point numbers of unknown range"]),
        (lambda index: (PIXELS[index], 0.5), ["the label of item 0", "0.5", "integer"]),
        (lambda index: (PIXELS[index], torch.eye(3)[0]), ["the label of item 0"]),
        (lambda index: (PIXELS[index], 2**70), ["64 bits"]),
        (lambda index: (PIXELS[index], index % 2, object()), ["the group of item 0"]),
        (lambda index: (PIXELS[index][: 1 + 2 * (index < 5)], index % 2), ["item 5", "1 channel(s)", "with 3"]),
        (lambda index: (NUMBERS[index] if index else PIXELS[0], 0), ["item 1", "an embedding of 5 numbers", "with 3"]),
        (lambda index: (NUMBERS[index][: 5 - index], index % 2), ["item 1", "of 4 numbers", "with an embedding of 5"]),
        (lambda index: (NUMBERS[index] / (index - 3), index % 2), ["the embedding of item 3", "NaN, infinity"]),
        (lambda index: (NUMBERS[index].long(), index % 2), ["torch.int64", "floating-point numbers (D,)"]),
        (lambda index: (PIXELS[index], "a" if index > 3 else 0), ["item 4", "'a'", "one kind"]),
        (lambda index: (PIXELS[index], "\x1b[2J" if index else "a"), ["data set 'x'", "class '\\x1b[2J'"]),
        (lambda index: (PIXELS[index], 1), ["data set 'x'", "1 class(es)"]),
    ],
)
def test_items_that_are_none_get_one_line_and_leave_nothing(
    make: Callable[[int], Any], parts: list[str], tmp_path: Path
) -> None:
    message = _refusal(tmp_path / "x.npz", Items(make))
    for part in parts:
        assert part in message


def test_data_sets_without_a_length_or_an_item_get_one_line(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    assert "has no length" in _refusal(tmp_path / "x.npz", Stream())
    assert "the train data set is empty" in _refusal(tmp_path / "x.npz", TensorDataset(PIXELS[:0], torch.zeros(0)))
    good = TensorDataset(PIXELS, torch.arange(24) % 2)
    assert "index from 0 to 2" in _refusal(
        tmp_path / "x.npz", TensorDataset(PIXELS, torch.arange(24)), classes=["a", "b", "c"]
    )
    assert "the validation data set is empty" in _refusal(tmp_path / "x.npz", good, validation=Items(lambda _: None, 0))


def test_a_file_that_is_there_is_kept_where_the_data_set_is_another(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.npz", TensorDataset(PIXELS, torch.arange(24) % 2))
    before = path.read_bytes()
    _write(path, TensorDataset(PIXELS, torch.arange(24) % 2))
    noise = Items(lambda index: (torch.rand(3, 8, 8), index % 2))
    relabelled = TensorDataset(PIXELS, torch.arange(24) % 3)
    for other in (relabelled, TensorDataset(PIXELS.flip(0), torch.arange(24) % 2), noise):
        with pytest.raises(StudyMismatchError, match=r"x\.npz' holds other images or labels"):
            _write(path, other)
    assert _stored(path)["labels"].tolist() == [0, 1] * 12
    assert len(path.read_bytes()) == len(before)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_a_call_that_was_refused_stands_in_nobodys_way(tmp_path: Path, own_cache: Path) -> None:
    """There is no study yet, whose trainings the file could be of."""
    data, config = TensorDataset(PIXELS, torch.arange(24) % 2), StudyConfig(name="x", important=("bad",), out=tmp_path)
    with pytest.raises(InputError, match="'bad' is no class here"):
        run(config, dataset=data)
    with pytest.raises(InputError, match="2 groups"):  # further on: these are too few
        run(config, dataset=Items(lambda index: (PIXELS[index], int(index == 0))), classes=["good", "bad"])


def test_what_is_missing_or_twice_is_said(tmp_path: Path) -> None:
    data = TensorDataset(PIXELS, torch.arange(24) % 2)
    with pytest.raises(InputError, match=r"has no name .*StudyConfig\(name=…\)"):
        run(StudyConfig(out=tmp_path), dataset=data)
    with pytest.raises(InputError, match="names the data set 'digits', and another is given"):
        run(StudyConfig(out=tmp_path, dataset="digits", name="x"), dataset=data)
    with pytest.raises(InputError, match="belong to a data set from Python"):
        run(StudyConfig(out=tmp_path), test=data)
    with pytest.raises(DataError, match="--group-by is for paths"):
        run(StudyConfig(out=tmp_path, name="x", group_by="(?P<group>.)"), dataset=data)


def test_the_example_of_run_works_and_the_command_line_goes_on_with_it(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(pipeline.run, "run", globs={})
    runner = doctest.DocTestRunner()
    assert runner.run(example, clear_globs=False) == (0, 6)
    result = example.globs["result"]
    options = ["--important", "striped", "--trials", 1, "--epochs", 1, "--seeds", 1, "--folds", 1, "--json"]
    again = camri_tune("run", "--dataset", "runs/stripes/stripes.npz", "--name", "stripes", *options, cwd=tmp_path)
    assert again.returncode in (0, 3), again.stderr
    for key in ("baseline", "trials", "images", "verdict"):
        assert result_of(again)[key] == json.loads(json.dumps(result.as_json()[key])), "nothing was trained anew"
    stored = Path("runs/stripes/stripes.npz").read_bytes()
    for mark in (Path("runs/stripes") / MARK, None):  # a study of an earlier version, or a copy, has none
        with pytest.raises(StudyMismatchError, match=r"stripes\.npz' holds other images"):
            run(example.globs["config"], dataset=Items(lambda index: (PIXELS[index], index % 2)))
        assert Path("runs/stripes/stripes.npz").read_bytes() == stored
        if mark is not None:
            mark.unlink()


def test_a_study_of_embeddings(tmp_path: Path, own_cache: Path) -> None:
    labels = torch.arange(240) % 3
    numbers = torch.eye(5)[labels] + 0.1 * torch.randn(240, 5, generator=torch.Generator().manual_seed(0))
    config = StudyConfig(
        name="x", model="head", important=("2",), trials=1, epochs=60, seeds=1, folds=1, finalists=1, out=tmp_path
    )
    result = run(config, dataset=TensorDataset(numbers, labels))
    assert result.baseline.test.accuracy.mean > 0.9
    with pytest.raises(DataError, match="give --model head"):
        run(StudyConfig(name="y", out=tmp_path), dataset=TensorDataset(numbers, labels))

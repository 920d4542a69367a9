"""Data sets that a CSV file lists: what is read, and what is refused with the row it stands in."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from camri_tune.config import StudyConfig, is_printable
from camri_tune.datasets import Dataset
from camri_tune.errors import DataError, InputError
from camri_tune.images import Images
from camri_tune.listed import listed_files
from camri_tune.sources import find_source
from tests.opening import message_of, open_data

Table = Callable[[str | bytes], Path]
COUNT = 12  # images of each class; 000.png to 023.png, the second half of class 'stop'


@pytest.fixture
def scans(tmp_path: Path, own_cache: Path) -> Path:
    """A folder with `images/NNN.png`, whose colour says which it is."""
    (tmp_path / "scans" / "images").mkdir(parents=True)
    for index in range(2 * COUNT):
        Image.new("RGB", (8, 8), (index, 100, 0)).save(tmp_path / "scans" / "images" / f"{index:03}.png")
    return tmp_path / "scans"


@pytest.fixture
def table(scans: Path) -> Table:
    """Write `labels.csv` beside the images."""

    def write(content: str | bytes) -> Path:
        path = scans / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _rows(separator: str = ",", end: str = "\n", group: int = 0, split: bool = False) -> str:
    """A row for each image; groups of so many neighbours; a quarter of each class test, a quarter validation."""
    lines = [["path", "label", *(["group"] if group else []), *(["split"] if split else [])]]
    for index in range(2 * COUNT):
        line = [f"images/{index:03}.png", "go" if index < COUNT else "stop"]
        line += [f"object {index // group}"] if group else []
        line += [("test", "val", "train", "train")[index % COUNT // 3]] if split else []
        lines.append(line)
    return "".join(separator.join(line) + end for line in lines)


def _numbers(images: Images) -> set[int]:
    return set(images.pixels[:, 0, 0, 0].tolist())


def _parts(data: Dataset) -> list[set[int]]:
    return [_numbers(part) for part in (data.train, data.validation, data.test())]


def test_images_that_a_list_names_are_split_and_labelled(table: Table) -> None:
    data = open_data(table(_rows()))
    assert (data.name, data.classes) == ("labels", ("go", "stop"))
    parts = _parts(data)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 2 * COUNT
    for images in (data.train, data.validation, data.test()):
        assert images.labels.tolist() == [int(n >= COUNT) for n in images.pixels[:, 0, 0, 0].tolist()]


def test_a_list_may_say_the_split(table: Table) -> None:
    train, validation, test = _parts(open_data(table(_rows(split=True))))
    assert test == {0, 1, 2, 12, 13, 14}
    assert validation == {3, 4, 5, 15, 16, 17}
    assert train == {*range(24)} - test - validation


def test_a_list_may_be_a_link_whose_paths_start_in_its_own_folder(table: Table, scans: Path) -> None:
    """As in the caches of data tools, where a file lies under its digest."""
    expected = _parts(open_data(table(_rows(split=True))))
    (scans.parent / "cache").mkdir()
    (scans / "labels.csv").rename(scans.parent / "cache" / "ab12")
    (scans / "labels.csv").symlink_to(scans.parent / "cache" / "ab12")
    config = StudyConfig.build({"dataset": str(scans / "labels.csv")}).absolute()
    assert config.source_name == "labels"
    data = open_data(config.dataset)
    assert data.name == "labels"
    assert _parts(data) == expected


def test_a_list_to_judge_on_needs_no_training_images(table: Table) -> None:
    rows = [line for line in _rows(split=True).splitlines() if "stop" not in line and not line.endswith("train")]
    path = table("\n".join(rows))
    source = listed_files(path, to_judge=True)
    assert source.classes == ("go",)
    assert set(source.parts) == {"validation", "test"}
    with pytest.raises(DataError, match="no images to train on"):
        listed_files(path)


def test_a_list_may_name_groups(table: Table) -> None:
    data = open_data(table(_rows(group=3)))
    parts = _parts(data)
    assert sum(map(len, parts)) == 2 * COUNT
    for first in range(0, 2 * COUNT, 3):
        assert [{first, first + 1, first + 2} <= part for part in parts].count(True) == 1


def test_a_pattern_names_groups_in_the_paths_of_a_list(table: Table) -> None:
    data = open_data(table(_rows()), group_by=r"^images/\d\d(?P<group>\d)")
    assert len(data.train) > len(torch.unique(data.train.groups))
    for digit in range(10):
        alike = {*range(digit, 2 * COUNT, 10)}
        assert [alike <= part for part in _parts(data)].count(True) == 1
    with pytest.raises(DataError, match="has a column 'group', so that --group-by has nothing to say"):
        open_data(table(_rows(group=3)), group_by=r"(?P<group>\d)")


@pytest.mark.parametrize(
    "content",
    [
        _rows().encode("utf-8-sig"),
        _rows(end="\r\n").encode(),
        _rows(separator=";").encode(),
        _rows(separator="\t").encode(),
        _rows(separator=" , ").encode(),
        _rows().replace("path,label", " Path , LABEL ").encode(),
        _rows().replace("images/000.png,go", '"images/000.png","go"').encode(),
        (_rows() + "\n\n").encode(),
        _rows().replace("\n", ",x,\n").replace("label,x,", "label,remark,").encode(),
        "\n".join(",".join(reversed(line.split(","))) for line in _rows().splitlines()).encode(),
        "\n".join(["path,label", *sorted(_rows().splitlines()[1:], reverse=True)]).encode(),
        _rows().replace("images/000.png", "./images/../images//000.png").encode(),
    ],
    ids=["BOM", "CRLF", "semicolons", "tabs", "spaces", "capitals", "quotes", "blank", "more", "order", "rows", "dots"],
)
def test_one_list_written_otherwise_is_the_same_data_set(content: bytes, table: Table) -> None:
    usual = open_data(table(_rows()))
    other = open_data(table(content))
    assert other.fingerprint == usual.fingerprint
    assert _parts(other) == _parts(usual)


def test_moving_a_list_with_its_images_changes_nothing(table: Table, scans: Path, tmp_path: Path) -> None:
    path = table(_rows(group=3))
    before = find_source(StudyConfig(dataset=str(path))).fingerprint()
    moved = shutil.move(scans, tmp_path / "moved")
    assert find_source(StudyConfig(dataset=str(Path(moved) / "labels.csv"))).fingerprint() == before
    (Path(moved) / "labels.csv").write_text(_rows(group=4))
    assert find_source(StudyConfig(dataset=str(Path(moved) / "labels.csv"))).fingerprint() != before


def test_a_study_of_a_list_is_called_like_it(table: Table) -> None:
    config = StudyConfig(dataset=str(table(_rows())))
    assert config.study_name == "labels-camri-worst1"
    assert config.absolute().study_name == config.study_name


def test_absolute_paths_may_lead_anywhere_and_relative_ones_may_not(table: Table, scans: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.png"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(elsewhere)
    data = open_data(table(_rows() + f"{elsewhere},go\n"))
    assert 200 in set.union(*_parts(data))
    with pytest.raises(DataError, match=r"row 26: path '\.\./elsewhere\.png' leads out of the folder") as raised:
        open_data(table(_rows() + "../elsewhere.png,go\n"))
    message_of(raised)
    (scans / "..x").mkdir()
    shutil.copy(elsewhere, scans / "..x" / "..y.png")
    assert 200 in set.union(*_parts(open_data(table(_rows() + "..x/..y.png,go\n"))))


def test_rows_without_a_group_stand_alone_and_are_told(table: Table) -> None:
    data = open_data(table(_rows(group=3).replace("object 0", "")))
    data.examine()
    assert any("3 of 24 rows have no group" in notice for notice in data.notices())


def _with(row: str, header: str = "path,label") -> str:
    return f"{header}\n" + "".join(_rows().splitlines(keepends=True)[1:]) + row


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty", "path,label"]),
        ("\n\n", ["is empty"]),
        ("images/000.png,go\nimages/001.png,stop\n", ["no column 'path'", "images/000.png,go", "path,label"]),
        ("path,class\n", ["no column 'label'"]),
        ("path,label,PATH\n", ["2 columns called 'path'"]),
        (_with("images/none.png,go\n"), ["row 26", "'images/none.png' is no file"]),
        (_with("images\\001.png,go\n"), ["row 26", "no file", "separated by /"]),
        (_with("images,go\n"), ["row 26", "'images' is no file"]),
        (_with("a\0b,go\n"), ["row 26", "'a\\x00b' is no file"]),
        (_with(",go\n"), ["row 26", "path is empty"]),
        (_with("images/001.png,\n"), ["row 26", "stands in row 3 already"]),
        (_with("./images/001.png,go\n"), ["row 26", "stands in row 3 already"]),
        (_with("images/001.png,go,there\n"), ["row 26", "3 value(s)", "header 2", "quote"]),
        (_with("images/001.png\n"), ["row 26", "1 value(s)"]),
        (_with('"images/001.png,go\n'), ["after row", "quotes"]),
        (_with("x" * 200_000 + ",go\n"), ["after row 25", "field larger"]),
        (_rows().replace("002.png,go", "002.png,"), ["row 4", "label is empty"]),
        (_rows().replace("002.png,go", "002.png,a/b"), ["row 4", "label is 'a/b'"]),
        (_rows().replace("002.png,go", "002.png,\x1b[2J"), ["row 4", "label is '\\x1b[2J'"]),
        (_rows(split=True).replace("003.png,go,val", "003.png,go,later"), ["row 5", "split is 'later'", "validation"]),
        (_rows(split=True).replace("003.png,go,val", "003.png,go,"), ["row 5", "split is ''"]),
        (_rows(split=True).replace("train", "test"), ["no images to train on"]),
        (_rows(split=True).replace("go,val", "go,train"), ["no image of class 'go' in split validation"]),
        (_rows().replace("stop", "go"), ["has 1 label", "at least 2"]),
        (_rows(group=5, split=True), ["group 'object 1' stands in two parts"]),
        (b"path,label\nimages/000.png,gr\xfcn\n", ["UTF-8"]),
        (_rows().encode("utf-16"), ["UTF-8"]),
    ],
)
def test_a_list_that_cannot_be_used_gets_one_line(content: str | bytes, parts: list[str], table: Table) -> None:
    path = table(content)
    with pytest.raises(DataError) as raised:
        open_data(path)
    for part in parts if "stands in two" in parts[0] else [str(path), *parts]:
        assert part in message_of(raised)


def test_a_listed_file_that_is_no_image_is_named(table: Table, scans: Path) -> None:
    (scans / "images" / "005.png").write_text("no image")
    with pytest.raises(DataError, match=r"005\.png' is not an image: .*--skip-corrupt"):
        open_data(table(_rows()))
    assert 5 not in set.union(*_parts(open_data(table(_rows()), skip_corrupt=True)))


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "long"])
def test_a_list_that_is_no_file_or_has_any_size_is_not_read(
    kind: str, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scans / "labels.csv"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(2**31)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"is a file of another kind|is longer than"):
        open_data(path)


MARKS = st.sampled_from(
    [",", ";", "\t", "\n", "\r", '"', "path", "label", "split", "group", "images/001.png", "..", "/"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(["", "path,label\n", "path,label,split\n", "path,label,group,split\n"]),
    body=st.one_of(st.binary(max_size=60), st.lists(st.one_of(MARKS, st.text(max_size=4))).map("".join)),
)
def test_lists_of_anything_are_read_or_refused_in_one_line(head: str, body: str | bytes, table: Table) -> None:
    end = body if isinstance(body, bytes) else body.encode(errors="surrogatepass")
    path = table(head.encode() + end)
    refusal = None
    try:
        listed_files(path)
    except InputError as error:
        refusal = str(error)
    assert refusal is None or (refusal and is_printable(refusal))

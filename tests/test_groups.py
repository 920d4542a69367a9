"""Groups that a pattern names: one side of every split for each, also across classes; and patterns that name none."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from camri_tune.config import StudyConfig, is_printable
from camri_tune.datasets import Dataset, open_test_images
from camri_tune.errors import DataError, InputError
from camri_tune.grouping import Listed, NotGroupedError, match_groups, number_groups
from camri_tune.images import Images
from camri_tune.sources import find_source
from tests.conftest import MakeFolder
from tests.opening import build_config, message_of, open_data
from tests.patience import ending_within

PATIENT = r"(?P<group>patient\d+)_"
CLASSES = ("healthy", "ill")


@pytest.fixture
def clinic(tmp_path: Path, own_cache: Path) -> Path:
    """Twelve patients with images of both classes; the colour of an image says whose it is, and which."""
    root = tmp_path / "clinic"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for patient in range(12):
            for view in range(3):
                colour = (patient, view, label)
                Image.new("RGB", (8, 8), colour).save(root / name / f"patient{patient}_{view}.png")
    return root


def _patients(images: Images) -> set[int]:
    return set(images.pixels[:, 0, 0, 0].tolist())


def _parts(data: Dataset) -> list[Images]:
    return [data.train, data.validation, data.test()]


@pytest.mark.parametrize("seed", range(5))
def test_a_patient_stands_on_one_side_whatever_the_class(seed: int, clinic: Path) -> None:
    parts = _parts(open_data(clinic, group_by=PATIENT, seed=seed))
    seen = [_patients(part) for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 12
    for part, patients in zip(parts, seen, strict=True):
        assert len(torch.unique(part.groups)) == len(patients)
        assert len(part) == 6 * len(patients), "with all images of both classes"


def test_without_the_pattern_they_stand_on_several(clinic: Path) -> None:
    train, validation, _ = _parts(open_data(clinic))
    assert _patients(train) & _patients(validation)


def test_a_pattern_is_searched_in_the_path_from_the_data_sets_folder_on(clinic: Path) -> None:
    """The class folder may be part of a group's name: then a number means another object in each class."""
    train, *_ = _parts(open_data(clinic, group_by=r"^(?P<group>[a-z]+/patient\d+)_"))
    both = {(int(image[0, 0, 0]), int(image[2, 0, 0])) for image in train.pixels}
    assert len(torch.unique(train.groups)) == len(both)
    with pytest.raises(DataError, match="matches none"):
        open_data(clinic, group_by=r"^(?P<group>patient\d+)_")
    with pytest.raises(DataError, match="matches none"):
        open_data(clinic, group_by=f"(?P<group>{clinic.name})")


def test_groups_make_another_data_set_and_another_study(clinic: Path) -> None:
    grouped, plain = build_config(clinic, group_by=PATIENT), build_config(clinic)
    assert find_source(grouped).fingerprint() != find_source(plain).fingerprint()
    assert grouped.identity() != plain.identity()
    assert find_source(grouped).cache_key() != find_source(plain).cache_key()
    assert "--group-by '(?P<group>patient\\d+)_'" in grouped.command()


def test_a_file_that_does_not_match_is_told_and_stands_alone(clinic: Path) -> None:
    for index in range(2):
        Image.new("RGB", (8, 8), (200 + index, 0, 0)).save(clinic / "ill" / f"scan{index}.png")
    data = open_data(clinic, group_by=PATIENT)
    data.examine()
    (line,) = [notice for notice in data.notices() if "does not match" in notice]
    assert "2 of 74 paths, such as 'ill/scan0.png'" in line
    assert sum(len(torch.unique(part.groups)) for part in _parts(data)) == 14


def test_where_nothing_matches_a_path_is_shown(clinic: Path) -> None:
    """A slip in the pattern must not make every image a group of its own."""
    with pytest.raises(NotGroupedError, match=r"matches none of 72 paths, such as 'healthy/patient0_0\.png'") as raised:
        open_data(clinic, group_by=r"(?P<group>pateint\d+)_")
    message_of(raised)


def test_a_pattern_that_tells_every_image_apart_is_told(clinic: Path) -> None:
    data = open_data(clinic, group_by=r"(?P<group>.*)\.png")
    data.examine()
    assert any("72 groups of one image each" in notice for notice in data.notices())


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("patient", ["'patient'", "no group of the name 'group'", "(?P<group>"]),
        ("(?P<patient>.)", ["no group of the name 'group'"]),
        ("(", ["RE2 cannot read", "missing )"]),
        ("(?P<group>a)(?=b)", ["RE2 cannot read", "look-around"]),
        (r"(?P<group>a)\1", ["RE2 cannot read", "references back"]),
        ("(?P<group>(a{1000}){1000})", ["RE2 cannot read"]),
        ("(?P<group>a", ["RE2 cannot read"]),
    ],
)
def test_a_pattern_that_cannot_be_used_gets_one_line(pattern: str, parts: list[str], clinic: Path) -> None:
    with pytest.raises(InputError) as raised:
        open_data(clinic, group_by=pattern)
    message = str(raised.value)
    assert "\n" not in message
    for part in ("--group-by", *parts):
        assert part in message


def test_no_pattern_takes_long() -> None:
    """Python's own `re` would not end."""
    with ending_within(20), pytest.raises(NotGroupedError):
        match_groups(r"(?P<group>(x+x+)+y|(x|x)*z|(.*.*.*)!)$", ["x" * 4_000] * 50)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.binary(max_size=40).filter(lambda name: b"\0" not in name))
def test_any_pattern_on_any_path_is_used_or_refused_in_one_line(pattern: str, name: bytes) -> None:
    for text in (pattern, f"(?P<group>{pattern})"):
        groups, refusal = [], ""
        try:
            groups = match_groups(text, [os.fsdecode(name)])
        except InputError as error:
            refusal = str(error)
        assert is_printable(refusal)
        assert bool(refusal) != bool(groups and groups[0])


def test_names_that_are_no_text_are_searched_as_they_are(clinic: Path) -> None:
    for place in range(2):
        name = os.fsencode(clinic / "ill") + b"/\xff\xfepatient99_%d.png" % place
        Path(os.fsdecode(name)).write_bytes((clinic / "ill" / f"patient0_{place}.png").read_bytes())
    source = find_source(build_config(clinic, group_by=PATIENT))
    assert source.notices == ()
    assert len({item.group for item in source.parts["train"]}) == 13


def test_a_group_in_two_parts_of_a_folder_is_refused(image_folder: MakeFolder) -> None:
    root = image_folder({"train/a": 3, "train/b": 3, "test/a": 3, "test/b": 3})
    with pytest.raises(DataError, match="group '000' stands in two parts") as raised:
        open_data(root, group_by=r"(?P<group>\d+)\.png")
    for part in ("train", "test", str(root / "train" / "a" / "000.png")):
        assert part in message_of(raised)
    grouped = open_data(root, group_by=r"^(?P<group>.*)\.png")
    assert len(grouped.test()) == 6


@given(
    st.dictionaries(
        st.sampled_from(["train", "validation", "test"]),
        st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=12),
        min_size=1,
    )
)
def test_numbers_stand_for_names_and_nobody_shares_one_without(names: dict[str, list[str | None]]) -> None:
    listed = {part: [Listed(f"{part}/{place}", 0, name) for place, name in enumerate(of)] for part, of in names.items()}
    shared = [n for n in "abcdef" if sum(n in of for of in names.values()) > 1]
    if shared:
        with pytest.raises(DataError, match="stands in two parts"):
            number_groups(listed)
        return
    for part, items in number_groups(listed).items():
        for first, name in zip(items, names[part], strict=True):
            for second, other in zip(items, names[part], strict=True):
                assert (first.group == second.group) == (first is second or (name is not None and name == other))


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_data_sets_of_the_house_take_no_pattern(dataset: str) -> None:
    with pytest.raises(DataError, match=f"--group-by is for images of your own, and {dataset} is not"):
        find_source(StudyConfig(dataset=dataset, group_by=PATIENT))


def test_other_images_are_judged_whatever_they_are_called(clinic: Path, image_folder: MakeFolder) -> None:
    config = build_config(clinic, group_by=PATIENT)
    fingerprint = find_source(config).fingerprint()
    others = image_folder({"healthy": 2, "ill": 3})
    unseen = open_test_images(str(others), trained_on=config, fingerprint=fingerprint, classes=CLASSES)
    assert (len(unseen.images), unseen.own) == (5, False)
    same = open_test_images(str(clinic), trained_on=config, fingerprint=fingerprint, classes=CLASSES)
    assert same.own
    assert _patients(same.images) == _patients(open_data(clinic, group_by=PATIENT).test())


def test_without_re2_the_extra_is_named(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(InputError, match=r"pip install 'camri-tune\[group-by\]'"):
        open_data(clinic, group_by=PATIENT)
    assert len(open_data(clinic).train) > 0


def test_limits_move_whole_groups_that_span_classes(clinic: Path) -> None:
    limited = open_data(clinic, group_by=PATIENT, limit=12)
    whole = open_data(clinic, group_by=PATIENT)
    assert len(limited.train) == 12
    counts = np.unique(limited.train.groups.numpy(), return_counts=True)[1]
    assert counts.tolist() == [6, 6]
    thinned = open_data(clinic, group_by=PATIENT, per_group=1)
    assert len(thinned.train) == 2 * len(torch.unique(whole.train.groups)), "one of each class"

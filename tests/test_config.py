"""The typed record of a study: what it accepts, what it says of what it refuses, and what makes two studies one."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camri_tune.config import (
    BUILT_IN_DATASETS,
    EXECUTION_FIELDS,
    MOST_SEEDS,
    MOST_TRIALS,
    SEEDS_APART,
    StudyConfig,
    names_a_database,
    read_study_file,
)
from camri_tune.errors import InputError
from camri_tune.files import own_path

# Key, value, and a word of the rule.
BROKEN_RULES: list[tuple[str, object, str]] = [
    ("dataset", "", "at least 1"),
    ("dataset", 3, "string"),
    ("important", 1.5, "tuple"),
    ("loss", "foo", "'camri'"),
    *(
        ("model", value, "'compact'")
        for value in ("foo", "resnet18", "timm:", "timm:a/b", "timm:hf-hub:a", "keras:a b")
    ),
    ("model", "torchvision:../x", "torchvision:NAME"),
    ("trials", 0, "greater than or equal to 1"),
    ("trials", 50_001, "less than or equal to 50000"),
    ("trials", 2.5, "integer"),
    ("trials", "many", "integer"),
    ("trials", True, "integer"),
    ("epochs", 0, "whole number from 1 to 100000"),
    ("epochs", 100_001, "whole number from 1 to 100000"),
    ("seeds", 0, "greater than or equal to 1"),
    ("seeds", 1_001, "less than or equal to 1000"),
    ("tolerance", -0.1, "greater than or equal to 0"),
    ("tolerance", 100.5, "less than or equal to 100"),
    ("tolerance", float("nan"), "0"),
    ("tolerance", float("inf"), "100"),
    ("tolerance", "little", "number"),
    *(("floor", value, "from 0 to 1, such as 'Stop>=0.9'") for value in ("", "Stop", ">=0.5", "Stop>0.5", "Stop>=")),
    *(("floor", value, "from 0 to 1, such as 'Stop>=0.9'") for value in ("a>=1.1", "a>=101%", "a>=nan", "a>=-0.1")),
    *(("floor", value, "from 0 to 1, such as 'Stop>=0.9'") for value in ("a>=1e-3", "a>=0,9", "a>=²", "a>=%", [3])),
    *(("floor", value, "from 0 to 1, such as 'Stop>=0.9'") for value in (["a>=1", "b"], [["a>=1"]], "a>=" + "9" * 40)),
    ("floor", 0.9, "tuple"),
    ("max_drop", -0.1, "greater than or equal to 0"),
    ("max_drop", 100.5, "less than or equal to 100"),
    ("max_drop", float("nan"), "0"),
    ("max_drop", "little", "number"),
    ("epsilon", -1, "greater than or equal to 0"),
    ("epsilon", 101, "less than or equal to 100"),
    ("finalists", 0, "greater than or equal to 1"),
    ("finalists", 6, "less than or equal to 5"),
    ("finalists", "auto", "integer"),
    ("finalists", True, "integer"),
    *(("folds", value, "whole number from 1 to 5, or 'auto'") for value in (0, -1, 6, "0", "6", "", "²", "many")),
    *(("folds", value, "whole number from 1 to 5, or 'auto'") for value in (2.0, True, None, [2])),
    ("image_size", 7, "greater than or equal to 8"),
    ("image_size", 513, "less than or equal to 512"),
    ("limit", 0, "greater than or equal to 1"),
    ("limit", 2**31, "less than 2147483648"),
    ("per_group", 0, "greater than or equal to 1"),
    ("per_group", 2**31, "less than 2147483648"),
    ("group_by", "", "at least 1 character"),
    ("group_by", "x" * 201, "at most 200 characters"),
    ("group_by", "(?P<group>\x1b)", "without control characters"),
    ("group_by", 3, "string"),
    ("skip_corrupt", "perhaps", "boolean"),
    ("calibrate", "perhaps", "boolean"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than"),
    *(("workers", value, "whole number from 0 to 1,024, or 'auto'") for value in (-1, "many", "-1", 1.5, True, "²")),
    *(("workers", value, "whole number from 0 to 1,024, or 'auto'") for value in (1_025, "1025", "9" * 100)),
    *(("workers_per_gpu", value, "whole number from 1 to 64, or 'auto'") for value in (65, 0, "0", True, 1.5, "many")),
    ("storage", "", "at least 1 character"),
    ("device", "tpu", "cuda"),
    ("device", "cuda:x", "cuda:N"),
    ("device", "cuda:255", "cuda:N"),
    ("name", "", "letters"),
    ("name", "..", "start with a letter or digit"),
    ("name", "a/b", "letters"),
    ("name", "a\nb", "letters"),
    ("name", "x" * 101, "no longer than 100 characters"),
    ("out", 3, "path"),
    ("weights", 3, "path"),
    *(("trainable", value, "last:N") for value in ("some", "last", "last:0", "last:-1", "last:99999", "last:²", "")),
    *(("backbone_lr", value, "number from 1e-06 to 10, a list") for value in (0, -1, 11, float("nan"), "fast")),
    ("learning_rate", 2, "number from 1e-05 to 1"),
    ("learning_rate", {"low": 0.1}, "{low = …, high = …, log = true}"),
    ("scale", [8, 8], "number from 0.1 to 1000"),
    ("margin", "2", "number from 0 to 1.99"),
    ("optimizer", "lion", "of muon, adamw"),
    ("schedule", "step", ", cosine,"),
    ("precision", "float16", ", bfloat16,"),
    ("weight_decay", -1, "number from 0 to 10"),
    ("warmup", 1, "number from 0 to 0.9"),
    *(("batch_size", value, "whole number from 2 to 65536") for value in (1, 2.5, True, "64,", "64..")),
    *(("augmentation", value, "number from 0 to 3") for value in ("wild", 4)),
    ("label_smoothing", 1, "number from 0 to 0.9"),
]


@pytest.mark.parametrize(("key", "value", "rule"), BROKEN_RULES)
def test_a_broken_rule_names_key_value_and_rule_in_one_line(key: str, value: object, rule: str) -> None:
    for source, shown in (("command line", f"--{key.replace('_', '-')} is "), ("studies/x.toml", f"{key} is ")):
        with pytest.raises(InputError) as raised:
            StudyConfig.build({key: value}, source=source)
        message = str(raised.value)
        assert "\n" not in message
        assert shown in message
        assert repr(value) in message
        assert rule in message
        assert message.startswith("studies/x.toml: ") == (source != "command line")


@pytest.mark.parametrize(("key", "value"), [("dataset", ""), ("important", ""), ("important", ","), ("important", [])])
def test_something_empty_is_refused_in_a_sentence_a_user_can_read(key: str, value: object) -> None:
    """'--important is (), but should be Tuple should have at least 1 item after validation, not 0' is none."""
    with pytest.raises(InputError, match=rf"^--{key} is .*at least 1[^\n]*$") as raised:
        StudyConfig.build({key: value})
    assert repr(value) in str(raised.value)
    assert str(raised.value).count("should") == 1
    assert "Tuple" not in str(raised.value)


def test_a_storage_that_is_none_is_not_shown_for_it_may_hold_a_password() -> None:
    with pytest.raises(InputError, match=r"^--storage is \*\*\*, but should be a valid string$"):
        StudyConfig.build({"storage": ["postgresql://user:hunter2@host/database"]})


@pytest.mark.parametrize("text", ["9" * 5_000, "0" * 5_000])
def test_a_count_of_any_length_is_refused_by_its_rule(text: str) -> None:
    for key in ("workers", "folds"):
        with pytest.raises(
            InputError, match=rf"^--{key} is '[09]*…, but should be a whole number from [01] to [0-9,]+, or"
        ):
            StudyConfig.build({key: text})


def test_the_seeds_of_the_largest_study_are_its_own() -> None:
    """Those of the search begin at 10,000 and the next study's base at SEEDS_APART."""
    assert MOST_SEEDS <= 10_000 <= SEEDS_APART - MOST_TRIALS


def test_an_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError) as raised:
        StudyConfig.build({"trails": 3}, source="studies/x.toml")
    message = str(raised.value)
    assert message.startswith("studies/x.toml: unknown key 'trails'; ")
    assert "\n" not in message
    for key in StudyConfig.model_fields:
        assert key in message


def test_of_several_errors_one_is_told() -> None:
    with pytest.raises(InputError) as raised:
        StudyConfig.build({"trials": 0, "epochs": 0, "bogus": 1})
    assert "\n" not in str(raised.value)


def test_a_study_cannot_be_changed_after_it_is_made() -> None:
    config = StudyConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


# --- study files ------------------------------------------------------------------------------------------------------


def test_a_study_file_gives_the_values_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('dataset = "gtsrb"\nimportant = [14, "Stop"]\ntolerance = 0.5\nworkers = 2\n', encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write('floor = ["Stop>=90%", "3 >= 0.5"]\nmax_drop = 2\n')
    config = StudyConfig.build(read_study_file(path), source=str(path))
    assert (config.floor, config.max_drop) == (("Stop>=0.9", "3>=0.5"), 2.0)
    assert (config.dataset, config.important, config.tolerance, config.workers) == ("gtsrb", ("14", "Stop"), 0.5, 2)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"trials = ", ["TOML", "end of document"]),
        (b"trials 3\n", ["TOML", "line 1"]),
        (b"trials = 1\ntrials = 2\n", ["TOML", "line 2"]),
        (b"name = '\xff\xfe'\n", ["TOML"]),
        (None, ["TOML", "directory"]),
    ],
)
def test_a_study_file_that_is_no_toml_gets_one_line(content: bytes | None, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_study_file(path)
    message = str(raised.value)
    assert "\n" not in message
    for part in (repr(str(path)), *parts):
        assert part in message


def test_a_study_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^study file '.*none\.toml' does not exist; .*\.toml file$"):
        read_study_file(tmp_path / "none.toml")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("worst1", ("worst1",)),
        ("14", ("14",)),
        (14, ("14",)),
        ("3,8", ("3", "8")),
        (" Stop , Yield ,", ("Stop", "Yield")),
        ([3, "8"], ("3", "8")),
        (["Stop, or go"], ("Stop, or go",)),
        (("median",), ("median",)),
    ],
)
def test_important_classes_come_as_text_number_or_list(given: object, expected: tuple[str, ...]) -> None:
    assert StudyConfig.build({"important": given}).important == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Stop>=0.9", ("Stop>=0.9",)),
        (" No entry  >= 90 % ", ("No entry>=0.9",)),
        (["a>=0.00001", "b>=0.0000000001%"], ("a>=0.00001", "b>=0")),
        (["3>=1", "worst1>=.5", "median>=0."], ("3>=1", "worst1>=0.5", "median>=0")),
        ("a>=b>=99.9%", ("a>=b>=0.999",)),
        ("x=>y>=0.25", ("x=>y>=0.25",)),
        ((), ()),
    ],
)
def test_a_floor_is_a_class_and_a_share(given: object, expected: tuple[str, ...]) -> None:
    assert StudyConfig.build({"floor": given}).floor == expected


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("3", 3), (3, 3)])
def test_workers_are_a_count_or_auto(given: object, expected: object) -> None:
    assert StudyConfig.build({"workers": given}).workers == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", "auto"), ("1", 1), (1, 1), ("3", 3), (5, 5), ("5", 5), ("05", 5)]
)
def test_folds_are_a_small_count_or_auto(given: object, expected: object) -> None:
    assert StudyConfig().folds == "auto"
    assert StudyConfig.build({"folds": given}).folds == expected


@pytest.mark.parametrize("seeds", [1, 3])
def test_folds_may_be_more_than_seeds(seeds: int) -> None:
    """The baseline gets models on those that are left."""
    config = StudyConfig.build({"folds": 5, "seeds": seeds})
    assert (config.folds, config.seeds) == (5, seeds)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (12, 3), (19, 4), (20, 5), (24, 5), (200, 5)],
)
def test_finalists_are_a_quarter_of_the_trials_unless_given(trials: int, expected: int) -> None:
    config = StudyConfig.build({"trials": trials})
    assert config.finalists is None
    assert config.most_finalists == expected
    for count in (1, 2, 5):
        assert StudyConfig.build({"trials": trials, "finalists": count}).most_finalists == count


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices_that_may_be_named(device: str) -> None:
    assert StudyConfig.build({"device": device}).device == device


def test_tolerance_is_in_percentage_points() -> None:
    assert StudyConfig.build({"tolerance": 1.5}).tolerance_fraction == 0.015


# --- the name of a study and of its folder ----------------------------------------------------------------------------

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def test_the_name_is_the_given_one_or_says_what_is_studied(tmp_path: Path) -> None:
    assert StudyConfig.build({"name": "mine"}).study_name == "mine"
    assert StudyConfig().study_name == "digits-camri-worst1"
    config = StudyConfig.build({"dataset": "gtsrb", "loss": "ce", "important": "Stop,No entry"})
    assert config.study_name == "gtsrb-ce-Stop-No_entry"
    folder = tmp_path / "my photos"
    folder.mkdir()
    config = StudyConfig.build({"dataset": str(folder), "out": tmp_path / "runs"})
    assert config.study_name == "my_photos-camri-worst1"
    assert config.folder == tmp_path / "runs" / "my_photos-camri-worst1"


NAMES = st.text(min_size=1).filter(str.strip)


@given(dataset=st.text(min_size=1).filter(lambda text: "\0" not in text), important=st.lists(NAMES, min_size=1))
@settings(deadline=None, max_examples=200)
def test_any_names_make_a_folder_name_that_is_safe(dataset: str, important: list[str]) -> None:
    config = StudyConfig.build({"dataset": dataset, "important": important, "out": "runs"})
    assert SAFE.fullmatch(config.study_name)
    assert config.folder.parent == Path("runs")
    assert StudyConfig.build({"name": config.study_name}).study_name == config.study_name


# --- identity ---------------------------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, object] = {
    "trials": 99,
    "workers": 7,
    "device": "cpu",
    "storage": "sqlite:///other.db",
    "name": "other",
    "out": "other",
    "data_dir": "other",
    "dataset": "gtsrb",
    "important": "3",
    "loss": "l2",
    "model": "timm:resnet18",
    "weights": "other.pt",
    "trainable": "last:2",
    "backbone_lr": 0.1,
    "learning_rate": "1e-4..1e-2 log",
    "scale": 16,
    "margin": "0.1,0.2",
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 0.1,
    "batch_size": 64,
    "augmentation": "strong",
    "precision": "float32",
    "label_smoothing": 0.1,
    "epochs": 3,
    "seeds": 5,
    "tolerance": 1.0,
    "floor": ["3>=0.9", "worst1>=0.5"],
    "max_drop": 2.0,
    "epsilon": 1.0,
    "finalists": 1,
    "folds": 3,
    "image_size": 16,
    "limit": 100,
    "group_by": "(?P<group>patient[0-9]+)_",
    "skip_corrupt": True,
    "seed": 1,
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_identity_is_what_gives_trials_their_meaning(key: str) -> None:
    same = StudyConfig.build({key: OTHER_VALUES[key]}).identity() == StudyConfig().identity()
    assert same == (key in EXECUTION_FIELDS)


def test_identity_has_every_other_field_and_is_json() -> None:
    identity = StudyConfig().identity()
    assert set(identity) == set(StudyConfig.model_fields) - EXECUTION_FIELDS
    assert json.loads(json.dumps(identity)) == identity


def test_what_is_stored_with_a_study_is_read_back_as_it_was() -> None:
    config = StudyConfig.build(OTHER_VALUES)
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert StudyConfig.build(stored) == config


# --- absolute paths ---------------------------------------------------------------------------------------------------


def test_absolute_paths_mean_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = StudyConfig.build({"dataset": "photos", "data_dir": "../data", "out": "runs"})
    absolute = config.absolute()
    assert absolute.dataset == str(tmp_path / "here" / "photos")
    assert absolute.data_dir == tmp_path / "data"
    assert absolute.out == tmp_path / "here" / "runs"
    assert absolute.study_name == config.study_name
    monkeypatch.chdir(tmp_path / "there")
    assert absolute.absolute() == absolute


@pytest.mark.parametrize("dataset", [*BUILT_IN_DATASETS, "unknown"])
def test_data_sets_that_are_no_folders_keep_their_name(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in BUILT_IN_DATASETS:
        (tmp_path / name).mkdir()  # a built-in name is the data set, whatever lies in the current folder
    assert StudyConfig.build({"dataset": dataset}).absolute().dataset == dataset


def test_calibrating_is_for_one_important_class() -> None:
    assert StudyConfig.build({"important": "3", "calibrate": True}).calibrate
    with pytest.raises(InputError, match="--calibrate is True, but should be left out with several"):
        StudyConfig.build({"important": "3,8", "calibrate": True})


def test_a_link_to_a_file_keeps_its_own_name_and_dots_mean_what_they_do_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's cache has the file under its digest, without the ending that tells what it is."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "9f3c").touch()
    (tmp_path / "blobs" / "deep").mkdir()
    for name in ("weights.safetensors", "features.npz"):
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "9f3c")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "blobs" / "deep")
    (tmp_path / "blobs" / "more.npz").touch()
    monkeypatch.chdir(tmp_path)
    linked = StudyConfig.build({"dataset": "features.npz", "weights": "weights.safetensors"}).absolute()
    assert linked.dataset == str(tmp_path / "features.npz")
    assert linked.weights == tmp_path / "weights.safetensors"
    assert linked.source_name == "features"
    dotted = StudyConfig.build({"dataset": "elsewhere/../more.npz"}).absolute()
    assert dotted.dataset == str(tmp_path / "blobs" / "more.npz"), "and not more.npz beside the link"
    assert own_path(Path("elsewhere/..")) == tmp_path / "blobs"


def test_what_is_not_said_of_places_is_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMRI_DATA", "env")
    monkeypatch.setenv("CAMRI_STORAGE", "sqlite:///env.db")
    here = StudyConfig().in_this_environment()
    assert (here.data_dir, here.storage) == (Path("env"), "sqlite:///env.db")
    said = StudyConfig(data_dir=Path("data"), storage=None).in_this_environment()
    assert (said.data_dir, said.storage) == (Path("data"), None), "also where it is the default"
    monkeypatch.setenv("CAMRI_DATA", "x" * 300)
    with pytest.raises(InputError, match=r"^\$CAMRI_DATA: data_dir is 'xxx"):
        StudyConfig().in_this_environment()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("postgresql+psycopg://me:hunter2@host/db", True), ("(sqlite:///study.db)", True), ("grpc:/host:1", True),
        ("s3://bucket/prefix", False), ("ray://host:1", False), ("https://host/x.csv", False), ("mysql", False),
    ],
)  # fmt: skip
def test_the_url_of_a_database_is_told_from_others(text: str, names: bool) -> None:
    assert names_a_database(text) is names

"""Numbers that a study fixes or searches: how they are read, what a trial's parameters are then, and the baseline's."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import cast, get_args

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camri_tune.config import SEARCHABLE, WORDS, Loss, StudyConfig, read_study_file
from camri_tune.datasets import Dataset
from camri_tune.errors import InputError
from camri_tune.ranges import (
    Bounds,
    Searchable,
    SearchRange,
    nearest,
    range_beyond,
    read_searchable,
    read_words,
    text_of,
)
from camri_tune.search import (
    Plan,
    make_sampler,
    recipe_choices,
    require_searchable,
    search_space,
    starting_points,
    suggest,
    worth_widening,
)

BOUNDS = Bounds(0.0, 100.0)
NUMBERS = st.floats(0, 100).map(abs)  # which makes of -0.0 what is shown as it
SPANS = (
    st.tuples(NUMBERS, NUMBERS, st.booleans())
    .filter(lambda s: s[0] < s[1] and (s[0] > 0 or not s[2]))
    .map(lambda s: SearchRange(low=s[0], high=s[1], log=s[2]))
)
CHOICES = st.lists(NUMBERS, min_size=2, max_size=5, unique=True).map(tuple)


@given(st.one_of(NUMBERS, SPANS, CHOICES))
def test_what_is_written_is_what_is_read(value: Searchable) -> None:
    """As text on a command line, and as JSON with a study."""
    assert read_searchable(text_of(value), BOUNDS) == value
    stored = json.loads(value.model_dump_json()) if isinstance(value, SearchRange) else json.loads(json.dumps(value))
    assert read_searchable(stored, BOUNDS) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        ("3", 3.0),
        ("1e-3..1e-1 log", SearchRange(low=1e-3, high=1e-1, log=True)),
        ("0..1", SearchRange(low=0, high=1)),
        ({"low": 1, "high": 2}, SearchRange(low=1, high=2)),
        ("1,2", (1.0, 2.0)),
        ([1, 2], (1.0, 2.0)),
        ([1], 1.0),
    ],
)
def test_numbers_and_what_is_searched(value: object, expected: Searchable) -> None:
    assert read_searchable(value, BOUNDS) == expected


WRONG = [
    *(
        "",
        "x",
        "1..",
        "..2",
        "2..1",
        "1..1",
        "0..1 log",
        "1..2 lin",
        "1..2..3",
        "1,,2",
        "1,1",
        "nan",
        "inf",
        "101",
        "-1",
    ),
    *("0..101", True, 10**400, float("nan"), object(), [], [1, "x"], [True, 2], [1, 101], list(range(40)), {}),
    *({"low": 1}, {"low": 2, "high": 1}, {"low": True, "high": 2}, {"low": [1], "high": 2}),
    *({"low": 1, "high": 2, "log": 1}, {"low": 1, "high": 2, "step": 1}),
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:12])
def test_anything_else_is_refused_with_the_rule(value: object) -> None:
    with pytest.raises(ValueError, match=r"^must be a number from 0 to 100, a list of up to 32 .* 'LOW\.\.HIGH log'$"):
        read_searchable(value, BOUNDS)


def test_counts_are_whole() -> None:
    for value in (2.5, "2.5..8", [2, 3.5]):
        with pytest.raises(ValueError, match="must be a whole number"):
            read_searchable(value, Bounds(1, 10, whole=True))


@given(st.floats(-10, 110), st.one_of(NUMBERS, SPANS, CHOICES))
def test_the_nearest_is_allowed_and_none_is_nearer(value: float, allowed: Searchable) -> None:
    found = nearest(value, allowed)
    if isinstance(allowed, SearchRange):
        assert allowed.low <= found <= allowed.high
        assert found == value or found in (allowed.low, allowed.high)
    else:
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        assert found in choices
        assert abs(found - value) == min(abs(choice - value) for choice in choices)


@pytest.mark.parametrize(
    ("value", "searched", "bounds", "expected"),
    [
        (0.6, "0..0.6", Bounds(0, 1.99), "0.3..0.9"),
        (0.595, "0..0.6", Bounds(0, 1.99), "0.3..0.9"),
        (0.59, "0..0.6", Bounds(0, 1.99), None),
        (0.0, "0..0.6", Bounds(0, 1.99), None),  # nothing is below
        (0.1, "0.1..0.3", Bounds(0, 1.99), "0..0.2"),
        (1.99, "1..1.99", Bounds(0, 1.99), None),
        (1.9, "1..1.9", Bounds(0, 1.99), "1.45..1.99"),
        (64.0, "4..64 log", Bounds(0.1, 1_000), "16..256 log"),
        (4.0, "4..64 log", Bounds(0.1, 1_000), "1..16 log"),
        (32.0, "4..64 log", Bounds(0.1, 1_000), None),
        (9.0, "6..9", Bounds(1, 100, whole=True), "7..11"),
        (1e-3, "1e-3..1.0000001e-3 log", Bounds(0, 1), None),  # too narrow to say where
    ],
)
def test_where_to_look_next(value: float, searched: str, bounds: Bounds, expected: str | None) -> None:
    found = range_beyond(value, cast(SearchRange, read_searchable(searched, bounds)), bounds)
    assert (None if found is None else text_of(found)) == expected


@given(SPANS, st.floats(0, 1), st.booleans())
def test_what_lies_beyond_may_be_searched_and_has_the_end_inside(
    searched: SearchRange, place: float, high: bool
) -> None:
    end = searched.high if high else searched.low
    for value in (end, searched.low + place * (searched.high - searched.low)):
        found = range_beyond(value, searched, BOUNDS)
        if found is not None:
            assert read_searchable(text_of(found), BOUNDS) == found
            assert found.low < searched.low < found.high or found.low < searched.high < found.high
            assert value != end or found.low < end < found.high


# --- in a study -------------------------------------------------------------------------------------------------------

STUDY = """
learning_rate = {low = 1e-4, high = 1e-2, log = true}
margin = 0.25
batch_size = [32, 64]
weight_decay = {low = 0.0, high = 0.1}
label_smoothing = 0.1
"""


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    (tmp_path / "study.toml").write_text(STUDY)
    return StudyConfig.build(read_study_file(tmp_path / "study.toml"), source="study.toml")


def test_a_study_file_says_what_is_searched_and_it_is_stored_with_the_study(config: StudyConfig) -> None:
    assert config.learning_rate == SearchRange(low=1e-4, high=1e-2, log=True)
    assert (config.margin, config.batch_size, config.label_smoothing) == (0.25, (32.0, 64.0), 0.1)
    assert StudyConfig.build(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    words = config.command()
    assert "--learning-rate '0.0001..0.01 log' --margin 0.25 --weight-decay 0..0.1 --batch-size 32,64" in words
    changed = config.model_copy(update={"margin": 0.3})
    assert changed.identity() != config.identity()


@pytest.mark.parametrize(
    "text", ["trials = {low = 1, high = 2}", "margin = {low = {a = 1}, high = 2}", "scale = [[1]]"]
)
def test_a_table_elsewhere_or_in_itself_is_refused(text: str, tmp_path: Path) -> None:
    assert tomllib.loads(text)
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(InputError, match="should be plain text"):
        read_study_file(tmp_path / "study.toml")


def _plan(config: StudyConfig, digits: Dataset, important: tuple[int, ...] = (3,)) -> Plan:
    return Plan(config, digits, torch.device("cpu"), important=important, floors=(0.5,), baseline_learning_rate=4e-3)


def _trial(seed: int = 0) -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()


@pytest.mark.parametrize("important", [(3,), (8, 3)])
def test_trials_stay_within_what_the_study_says(
    important: tuple[int, ...], config: StudyConfig, digits: Dataset
) -> None:
    for seed in range(20):
        trial = _trial(seed)
        head, rate = suggest(trial, "search", _plan(config, digits, important))
        assert 1e-4 <= rate <= 1e-2
        assert head.margins == dict.fromkeys(important, 0.25)
        assert 3.1 <= head.scale <= 25
        choices = recipe_choices(config, trial.params)
        assert choices["batch_size"] in (32, 64)
        assert isinstance(choices["batch_size"], int)
        assert 0 <= choices["weight_decay"] <= 0.1
        assert choices["label_smoothing"] == 0.1
        assert "label_smoothing" not in trial.params, "it is the same in all trials"
        assert set(trial.params) == set(search_space(config, important, 10, 4e-3))


def test_the_baseline_shares_what_is_fixed_and_has_its_own_where_something_is_searched(
    config: StudyConfig, digits: Dataset
) -> None:
    trial = _trial()
    suggest(trial, "baseline", _plan(config, digits))
    assert set(trial.params) == {"learning_rate"}
    choices = recipe_choices(config, trial.params)
    assert choices["label_smoothing"] == 0.1
    assert choices["batch_size"] is None
    assert choices["weight_decay"] is None


def test_a_study_that_says_nothing_searches_what_its_loss_has(digits: Dataset) -> None:
    config = StudyConfig()
    assert not [name for name, value in recipe_choices(config, {}).items() if value != getattr(config, name)]
    assert list(search_space(config, [3], 10, 4e-3)) == ["learning_rate", "scale", "margin"]


def test_the_first_trials_are_the_starting_points_as_far_as_they_may_be(config: StudyConfig, digits: Dataset) -> None:
    points = starting_points(config, [3], 10, 8e-3)
    assert len(points) >= 4
    assert {point["margin"] for point in points} == {0.25}
    assert {point["learning_rate"] for point in points} == {4e-3, 8e-3, 1e-2}
    assert [point["scale"] for point in points[:2]] == [6.2, 4.7]
    study = optuna.create_study()
    for point in points:
        study.enqueue_trial(point)
        trial = study.ask()
        suggest(trial, "search", _plan(config, digits))
        assert {name: trial.params[name] for name in point} == point, "tried as it stands"
    again = optuna.create_study()
    again.enqueue_trial(study.trials[0].params)  # as for a finalist
    trial = again.ask()
    suggest(trial, "search", _plan(config, digits))
    assert trial.params == study.trials[0].params


@pytest.mark.parametrize(
    ("scale", "first"),
    [
        ("8..64 log", [16.0, 12.0, 16.0, 24.0, 12.0, 16.0]),
        ("10..20", [13.0, 12.0, 13.0, 15.0, 12.0, 13.0]),
        ("32,8,16", [16.0, 8.0, 16.0, 16.0, 8.0, 16.0]),
        ("16", [16.0] * 6),
    ],
)
def test_the_first_trials_are_spread_over_what_the_study_says(scale: str, first: list[float]) -> None:
    points = starting_points(StudyConfig.build({"scale": scale}), [3], 3, 4e-3)
    assert [point["scale"] for point in points] == first


def test_a_notice_names_what_came_out_at_an_end_and_the_option_that_looks_beyond(config: StudyConfig) -> None:
    params = {
        "learning_rate": 1e-2,
        "scale": 25.0,
        "margin_3": 0.25,  # fixed
        "margin_5": 0.25,
        "batch_size": 64,  # chosen from a list
        "weight_decay": 0.05,
    }
    assert worth_widening(config, (3, 5), 10, 4e-3, params, 1000) == [
        "The best learning_rate, 0.01, lies at the end of what was searched, 0.0001..0.01 log: better may lie beyond. "
        "Another study (--name) with --learning-rate '0.001..0.1 log' looks there.",
        "The best scale, 25, lies at the end of what was searched, 3.1..25 log: better may lie beyond. "
        "Another study (--name) with --scale '8.8..71 log' looks there.",
    ]
    params = {"learning_rate": 4e-3, "scale": 16.0, "margin_3": 0.0, "margin_5": 0.6}
    several = worth_widening(StudyConfig(), (3, 5), 10, 4e-3, params, 1000)
    batch = StudyConfig.build({"batch_size": "16..256 log"})
    for images, said in ((150, False), (10_000, True)):
        lines = worth_widening(batch, (3, 5), 10, 4e-3, {**params, "margin_5": 0.3, "batch_size": 256}, images)
        assert any("batch_size" in line for line in lines) == said, "no batch is larger than the training part"
    assert [("best margin_5" in line, "--margin '0.3..0.9'" in line) for line in several] == [(True, True)]


@pytest.mark.parametrize(
    ("loss", "key", "owners"),
    [
        ("ce", "margin", "arcface, camri, cosface-i"),
        ("l2", "margin", "arcface, camri, cosface-i"),
        ("l2", "scale", ""),
        ("wce", "weight", ""),
        ("camri", "weight", "wce"),
        ("crwwce", "w_fn", ""),
        ("wce", "w_fp", "crwwce"),
    ],
)
def test_a_parameter_that_the_loss_does_not_have_is_refused(loss: Loss, key: str, owners: str) -> None:
    config = StudyConfig.build({"loss": loss, key: 1})
    if not owners:
        require_searchable(config)
        assert search_space(config, [3], 10, 1e-3)[key] == 1
        assert set(search_space(config, [3, 5], 10, 1e-3)) & {key, f"{key}_3"}
        return
    option = key.replace("_", "-")
    with pytest.raises(InputError, match=rf"^--{option} is no parameter of --loss {loss}, but of {owners}: leave"):
        require_searchable(config)
    several: list[Loss] = ["ce", loss]
    with pytest.raises(InputError, match=rf"^--{option} is no parameter of any of --methods ce, {loss}, but of"):
        require_searchable(config, several, "any of --methods")
    for owner in get_args(Loss):
        if owner in owners.split(", "):
            require_searchable(config, [*several, owner], "any of --methods")


@given(st.lists(st.sampled_from(WORDS["optimizer"]), min_size=1, unique=True))
def test_words_that_are_written_are_those_that_are_read(words: list[str]) -> None:
    known = WORDS["optimizer"]
    value = tuple(words) if len(words) > 1 else words[0]
    assert read_words(text_of(value), known) == value
    assert read_words(words, known) == value
    config = StudyConfig.build({"optimizer": words})
    assert StudyConfig.model_validate_json(config.model_dump_json()) == config


@given(st.lists(st.text(st.sampled_from('ab ",14'), min_size=1).map(str.strip).filter(bool), min_size=1, max_size=3))
def test_classes_are_named_as_the_command_of_a_study_says(names: list[str]) -> None:
    """Also where a name has a comma in it."""
    config = StudyConfig.build({"important": names, "name": "x"})
    words = shlex.split(config.command())
    written = words[words.index("--important") + 1] if "--important" in words else "worst1"
    assert StudyConfig.build({"important": written}).important == config.important == tuple(names)


def test_a_list_of_one_is_what_the_command_of_a_study_says() -> None:
    """Which can give no such list: a study of the same command is to be the same."""
    listed = StudyConfig.build({"learning_rate": [0.001], "margin": [0.2], "optimizer": ["sgd"], "batch_size": [64]})
    assert listed == StudyConfig.build({"learning_rate": 0.001, "margin": 0.2, "optimizer": "sgd", "batch_size": 64})
    assert listed.fixed_learning_rate == 0.001


@pytest.mark.parametrize(
    ("epochs", "baseline", "trial", "most"),
    [
        (None, 20, 20, 20),
        (5, 5, 5, 5),
        ("5", 5, 5, 5),
        ([5, 30], 20, 7, 30),
        ("2..9", 20, 7, 20),
        ("2..50 log", 20, 7, 50),
    ],
)
def test_epochs_are_the_data_sets_fixed_or_searched(epochs: object, baseline: int, trial: int, most: int) -> None:
    config = StudyConfig.build({"epochs": epochs})
    searched = {"epochs": 7} if trial == 7 else {}
    found = config.epochs_of(20), config.epochs_of(20, searched), config.most_epochs(20)
    assert found == (baseline, trial, most)
    assert all(isinstance(number, int) for number in found)
    assert StudyConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("key", WORDS)
@pytest.mark.parametrize("value", ["", "foo", "adamw,foo", [], ["foo"], 3, True, {"low": 1}, ["adamw", 3], "auto,auto"])
def test_what_is_no_word_gets_one_line(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^--{key} is .* should be one of {', '.join(WORDS[key])}, or a list of"):
        StudyConfig.build({key: value})


def test_every_number_and_word_can_be_searched_by_the_sampler_of_a_study(digits: Dataset) -> None:
    values: dict[str, object] = {name: f"{max(b.low, 0.01):g}..{b.high:g}" for name, b in SEARCHABLE.items()}
    words = {name: ",".join(known) for name, known in WORDS.items()}
    config = StudyConfig.build({**values, **words, "batch_size": "16..64 log", "warmup": [0.1, 0.2, 0.4]})
    study = optuna.create_study(sampler=make_sampler(config, seed=0), direction="maximize")
    for number in range(9):  # the last three by a Gaussian process
        trial = study.ask()
        suggest(trial, "search", _plan(config, digits))
        assert set(trial.params) == {*SEARCHABLE, *WORDS} - {"weight", "w_fn", "w_fp"}, "which are other losses'"
        assert all(recipe_choices(config, trial.params)[name] in known for name, known in WORDS.items())
        assert recipe_choices(config, trial.params)["batch_size"] in range(16, 65)
        assert trial.params["warmup"] in (0.1, 0.2, 0.4)
        trial.set_constraint("accuracy", 0.1 - number / 40)
        study.tell(trial, number / 10)

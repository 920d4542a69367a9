"""A study at a glance: what is read from its storage, where studies are found, and `camri-tune status`."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from rich.console import Console

from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import InputError
from camri_tune.overview import RESULT, find_study, read_overview, studies_in
from camri_tune.storage import StudyStore
from camri_tune.study_note import publish
from camri_tune.study_page import study_page
from camri_tune.tables import status_view
from tests.command import assert_one_line_error, camri_tune, result_of
from tests.studies import FLOOR, hand_made, trial

Make = Callable[..., StudyStore]

SEARCH = [
    trial(0.80, 0.93),
    trial(0.95, 0.89),  # the best recall, below the floor
    trial(0.84, 0.91),
    trial(state=OptunaState.FAIL, failure="ValueError: no (x.py:1)"),
    trial(state=OptunaState.FAIL, interrupted=True),
    trial(0.99, None, retry_of=4),
    trial(state=OptunaState.RUNNING, epoch=1),
    trial(state=OptunaState.WAITING),
]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(StudyConfig(limit=200))


@pytest.fixture
def make(tmp_path: Path, digits: Dataset, empty_database: Path) -> Make:
    def make(search: list[FrozenTrial] = SEARCH, finalists: tuple[FrozenTrial, ...] = (), **options: Any) -> StudyStore:
        return hand_made(tmp_path, digits, empty_database, search, finalists, limit=200, **options)

    return make


def _shown(store: StudyStore) -> str:
    text = io.StringIO()
    Console(width=140, file=text).print(status_view(read_overview(store)), soft_wrap=True)
    return text.getvalue()


def test_the_best_so_far_is_feasible_and_complete(make: Make) -> None:
    overview = read_overview(make())
    assert overview.best is not None
    assert overview.best.number == 2
    assert overview.floor == FLOOR
    assert overview.important_names == "3"
    assert [r.number for r in overview.search] == [0, 1, 2, 3, 5, 6, 7], "an interrupted training lives on in another"
    assert overview.stage == "search"


def test_where_nothing_keeps_the_floor_there_is_no_best(make: Make) -> None:
    store = make([trial(0.95, 0.89)])
    assert read_overview(store).best is None
    assert "no trial above the floor yet" in _shown(store)


def test_the_baseline_is_its_models_on_the_seeds_that_count(make: Make) -> None:
    store = make()
    store.optuna_study("baseline").add_trial(trial(0.1, 0.2, params={"learning_rate": 0.1}, seed=20_000))
    overview = read_overview(store)
    assert overview.baseline is not None
    assert overview.baseline.accuracy == pytest.approx(FLOOR)
    assert overview.baseline.measured(overview.important).recall.mean == pytest.approx(0.72)


def test_before_the_baseline_is_trained_little_is_known(make: Make) -> None:
    store = make([], important="worst1")
    store.set("baseline", None)
    overview = read_overview(store)
    assert overview.important_names == "worst1"
    assert (overview.floor, overview.best, overview.baseline) == (None, None, None)
    assert overview.as_json()["baseline"] is None
    assert "worst1" in _shown(store)


def test_finalists_are_grouped_by_the_trial_they_come_from(make: Make) -> None:
    models = tuple(trial(0.8 + n / 100, 0.92, source_trial=source, seed=n) for source in (2, 0) for n in (0, 1))
    overview = read_overview(make(finalists=models))
    assert {n: [r.seed for r in found] for n, found in overview.retrained.items()} == {2: [0, 1], 0: [0, 1]}


def test_the_search_lasts_while_a_trial_is_left_though_finalists_are_begun(make: Make) -> None:
    model = trial(0.8, 0.92, source_trial=2, seed=0)
    assert read_overview(make(finalists=(model,))).stage == "search"
    assert read_overview(make(SEARCH[:3], finalists=(model,), name="ended")).stage == "finalists"


def test_the_time_to_go_counts_what_is_left(make: Make) -> None:
    overview = read_overview(make())
    # Of 7 trials 1 waits and 1 has half of its epochs to go; then 2 finalists; 3 seconds each.
    assert overview.seconds_left == pytest.approx((1 + 0.5 + 2) * 3.0)


def test_curves_and_confusion_are_read_with_a_trial(make: Make) -> None:
    record = read_overview(make()).search[0]
    assert [(p.epoch, p.accuracy) for p in record.curve] == [(1, 0.465), (2, 0.93)]
    assert record.curve[1].recall_per_class[3] == 0.80
    assert len(record.confusion) == len(record.confusion[0]) == 10


def test_it_knows_whether_a_run_is_at_work(make: Make) -> None:
    store = make()
    assert not read_overview(store).running
    with store.held():
        assert read_overview(store).running
        assert "running, about" in _shown(store)
    assert not read_overview(store).running
    assert "no run works on it now; the same command goes on" in _shown(store)


@pytest.mark.parametrize("content", ['{"schema": 1,', "{}", "[1]", '{"verdict": "certified", "best": {}}'])
def test_a_result_that_is_none_gets_one_line(content: str, make: Make, tmp_path: Path) -> None:
    store = make()
    path = store.config.folder / RESULT
    path.write_text(content)
    with pytest.raises(InputError, match=r"result\.json.*again"):
        read_overview(store)
    assert_one_line_error(camri_tune("status", "s", "--out", tmp_path), str(path), "run the study's command again")


def test_studies_are_found_by_name_by_folder_and_by_age(make: Make, tmp_path: Path) -> None:
    make(name="old")
    make(name="new")
    for path in (tmp_path / "old").glob("study.db*"):
        os.utime(path, (1, 1))
    assert [folder.name for folder in studies_in(tmp_path)] == ["old", "new"]
    for name, expected in ((None, "new"), ("old", "old"), (str(tmp_path / "old"), "old")):
        store = find_study(name, out=tmp_path, storage=None)
        assert store.name == expected
        assert store.config.folder == (tmp_path / expected).resolve()


def test_a_study_that_was_moved_is_read_where_it_lies(make: Make, tmp_path: Path) -> None:
    make()
    moved = (tmp_path / "s").rename(tmp_path / "elsewhere-s")
    (tmp_path / "elsewhere").mkdir()
    moved = moved.rename(tmp_path / "elsewhere" / "s")
    overview = read_overview(find_study("s", out=tmp_path / "elsewhere", storage=None))
    assert overview.folder == moved.resolve()
    assert f"--out {moved.parent}" in overview.command


def test_a_study_in_a_named_storage_needs_its_name(make: Make, tmp_path: Path) -> None:
    url = f"sqlite:///{make().config.folder / 'study.db'}"
    assert find_study("s", out=tmp_path / "nowhere", storage=url).name == "s"
    assert not (tmp_path / "nowhere").exists(), "to look makes no folders"
    with pytest.raises(InputError, match="needs the NAME"):
        find_study(None, out=tmp_path, storage=url)


def test_another_studys_folder_of_the_same_name_is_not_taken(make: Make, tmp_path: Path) -> None:
    make().storage.close()  # which leaves all of it in one file
    database = (tmp_path / "s" / "study.db").rename(tmp_path / "shared.db")
    url, other = f"sqlite:///{database}", tmp_path / "other"
    assert find_study("s", out=other, storage=url).config.folder == tmp_path / "s", "where its files are"
    (tmp_path / "s").rename(tmp_path / "gone")
    assert find_study("s", out=other, storage=url).config.folder == other / "s"
    (other / "s").mkdir(parents=True)
    (other / "s" / "study.db").touch()
    with pytest.raises(InputError, match="another study of that name"):
        find_study("s", out=other, storage=url)


def test_a_folder_that_another_study_took_is_not_shown_as_this_ones(make: Make, tmp_path: Path) -> None:
    store = make()
    url = f"sqlite:///{store.config.folder / 'study.db'}"
    assert not find_study("s", out=tmp_path, storage=url).has_anothers_folder()
    (store.config.folder / ".study").write_text("of another")
    with pytest.raises(InputError, match="another study of that name"):
        find_study("s", out=tmp_path, storage=url)


def test_a_folder_may_be_renamed_copied_and_linked(make: Make, tmp_path: Path) -> None:
    make().storage.close()
    shutil.copytree(tmp_path / "s", tmp_path / "s-backup")
    (tmp_path / "s").rename(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name, folder in (("kept", "kept"), ("s-backup", "s-backup"), ("link", "kept")):
        overview = read_overview(find_study(name, out=tmp_path, storage=None))
        assert overview.folder == (tmp_path / folder).resolve()
        assert overview.best is not None
    assert find_study(None, out=tmp_path, storage=None).name == "s"


def test_a_renamed_folder_says_what_its_command_needs(make: Make, tmp_path: Path) -> None:
    """Under another name the command is refused: the folder is of the study that lies in it."""
    store = make()
    assert "call the folder" not in _shown(store)
    store.storage.close()
    (tmp_path / "s").rename(tmp_path / "kept")
    found = find_study("kept", out=tmp_path, storage=None)
    overview = read_overview(found)
    assert "--name s " in overview.command
    assert f"call the folder 's' first, as its study is called; then `{overview.command}` goes on" in _shown(found)
    page = study_page(overview, {}, None)
    assert "call the folder &#x27;s&#x27; first" in page
    assert "--name s " in page


def test_a_folder_without_a_study_does_not_hide_the_last_one(make: Make, tmp_path: Path, empty_database: Path) -> None:
    """A run that was refused leaves a database that is newer and empty."""
    make()
    (tmp_path / "refused").mkdir()
    shutil.copy(empty_database, tmp_path / "refused" / "study.db")
    os.utime(tmp_path / "refused" / "study.db")
    assert studies_in(tmp_path)[-1].name == "refused"
    assert find_study(None, out=tmp_path, storage=None).name == "s"
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(InputError, match="has no studies; start one"):
        find_study(None, out=tmp_path, storage=None)


def test_a_comparison_is_as_far_as_the_studies_within_it(make: Make, digits: Dataset) -> None:
    store = make([])
    store.set("cells", [])
    planned = {"baseline": 2, "search": 2, "finalists": 2}
    store.set("schedule", {"planned": planned, "epochs": 2, "workers": 1, "folds": 1})
    config = store.config.model_copy(update={"name": "s.l2", "loss": "l2"})
    cell = StudyStore.create(store.storage, config, digits, within=store)
    cell.optuna_study("search").add_trial(trial(0.8, 0.93))
    with store.held():
        assert read_overview(store).seconds_left == pytest.approx((1 + 2) * 3.0)
        cell.optuna_study("search").add_trial(trial(0.8, 0.93))
        for seed in (0, 1):
            cell.optuna_study("finalists").add_trial(trial(0.8, 0.93, source_trial=0, seed=seed))
        overview = read_overview(store)
        assert (overview.seconds_left, overview.stage) == (0.0, "finalists")
        assert "s: running, then the judgement" in _shown(store)
        assert re.search(r"Search +│ +2 of 2 ", _shown(store))
        publish(overview, store)
        assert "Finalists on fresh seeds: 2 of 2 done. Then comes the judgement." in _note(store)
    store.set("judged", True)
    publish(read_overview(store), store)
    publish(read_overview(store.cell("s.l2")), cell)
    assert "The run is through." in _note(store)
    assert "2 of 2 queued so far done. The note of `s` says how far the whole comparison is." in _note(cell)
    for each in (store, cell):
        assert "Export" not in _note(each)
        assert "camri-tune dashboard" not in _note(each)
    assert "Command: <code>camri-tune compare …</code>" in study_page(read_overview(store), {}, None)


def _note(store: StudyStore) -> str:
    return str(optuna_dashboard.get_note(store.optuna_study("search")))


def test_to_look_at_a_study_is_no_work_on_it(make: Make, tmp_path: Path) -> None:
    """Whoever reads a database in WAL mode leaves an empty file beside it."""
    for name in ("old", "new"):
        make(name=name).storage.close()
    os.utime(tmp_path / "old" / "study.db", (1, 1))
    assert camri_tune("status", "old", "--out", tmp_path).returncode == 0
    (tmp_path / "old" / "study.db-wal").touch()
    assert [folder.name for folder in studies_in(tmp_path)] == ["old", "new"]
    (tmp_path / "old" / "study.db-wal").write_bytes(b"something that was written")
    assert [folder.name for folder in studies_in(tmp_path)] == ["new", "old"]


def test_a_result_from_before_more_trials_were_asked_for_is_said_to_be(make: Make) -> None:
    store = make(SEARCH[:3])
    result: dict[str, Any] = {
        "verdict": "none",
        "sentence": "No model: so.",
        "best": None,
        "baseline": {},
        "finalists": [],
    }
    result |= {"images": {}, "notices": [], "provenance": [], "accuracy_difference": None}
    (store.config.folder / RESULT).write_text(json.dumps(result))
    store.set("stage", "done")
    assert read_overview(store).stage == "judged"
    assert "s: finished" in _shown(store)
    assert "\nnone: No model: so." in _shown(store)
    store.set("judged", False)  # trained, and test is being asked
    assert not read_overview(store).finished
    store.set("judged", True)
    assert read_overview(store).finished
    store.set("stage", "running")  # and killed, or interrupted
    store.set("judged", False)
    store.enqueue("search", {})
    overview = read_overview(store)
    assert (overview.stage, overview.finished) == ("search", False)
    assert "s: no run works on it now; the same command goes on" in _shown(store)
    assert "of an earlier run: none: No model: so." in _shown(store)


def test_finalists_have_the_figures_that_they_were_judged_by(make: Make) -> None:
    """A bias that is tuned after training changes both, and only the result knows of it."""
    models = tuple(trial(0.8 + n / 100, 0.92, source_trial=source, seed=n) for source in (2, 0) for n in (0, 1))
    store = make(finalists=models)
    assert read_overview(store).finalist_figures[2][1].values == (0.8, 0.81)
    judged = {"accuracy": {"values": [0.91, 0.9]}, "recall": {"values": [0.95, None]}}
    finals = [{"trial": 2, "validation": judged}, {"trial": 0, "validation": None}]
    result: dict[str, Any] = {"verdict": "none", "sentence": "No.", "best": None, "baseline": {}, "finalists": finals}
    result |= {"images": {}, "notices": [], "provenance": [], "accuracy_difference": None}
    (store.config.folder / RESULT).write_text(json.dumps(result))
    figures = read_overview(store).finalist_figures
    assert figures[2][0].values == (0.91, 0.9)
    assert figures[2][1].values[0] == 0.95
    assert figures[0][1].values == (0.8, 0.81)


def test_what_the_baseline_failed_with_is_shown(make: Make) -> None:
    store = make([])
    store.optuna_study("baseline").add_trial(trial(state=OptunaState.FAIL, failure="ValueError: no (x.py:1)"))
    assert "failed baseline #2: ValueError: no (x.py:1)" in _shown(store)


def test_a_data_set_may_have_brackets_in_its_name(make: Make) -> None:
    store = make()
    store.set("identity", {**store.attributes["identity"], "dataset": "photos (1) (0123abcd)"})
    assert read_overview(store).dataset == "photos (1)"


def test_to_look_at_a_study_does_not_load_torch() -> None:
    code = "import sys, camri_tune.overview, camri_tune.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_status_from_another_terminal(make: Make, tmp_path: Path) -> None:
    make()
    done = camri_tune("status", "s", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "important class 3" in text
    assert "best above the floor so far: #2, recall 0.8400, accuracy 0.9100 on validation" in text
    assert "failed #3: ValueError: no" in text
    assert "5 of 7" in text or "4 of 7" in text
    status = result_of(camri_tune("status", "--out", tmp_path, "--json"))
    assert status["best"]["trial"] == 2
    assert status["failures"] == {"3": "ValueError: no (x.py:1)"}
    assert status["trials"]["search"]["running"] == 1
    assert status["verdict"] is None
    assert json.dumps(status)


def test_a_study_that_is_not_there_gets_one_line(make: Make, tmp_path: Path) -> None:
    assert_one_line_error(camri_tune("status", "--out", tmp_path), str(tmp_path), "no studies", "camri-tune run")
    make()
    assert_one_line_error(camri_tune("status", "other", "--out", tmp_path), "'other'", "s", "--storage")
    assert_one_line_error(camri_tune("report", "other", "--out", tmp_path), "'other'")

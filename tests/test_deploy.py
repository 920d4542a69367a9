"""The files under deploy/: they parse, and the very commands in them train."""

import importlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from camri_tune.config import StudyConfig
from camri_tune.database import STORAGE_VARIABLE, open_storage
from camri_tune.datasets import open_dataset
from camri_tune.storage import StudyStore, storage_url
from tests.command import COMMAND
from tests.patience import wait_for

DEPLOY = Path(__file__).parents[1] / "deploy"
SBATCH = DEPLOY / "slurm.sbatch"
STUDY = "my-study"
DIRECTIVES = {  # those that the file may use, and what sbatch takes for them
    "job-name": r"[\w.-]+",
    "array": r"\d+-\d+(%\d+)?",
    "ntasks": r"1",
    "cpus-per-task": r"[1-9]\d*",
    "gpus-per-task": r"1",
    "mem": r"\d+[MG]",
    "time": r"\d\d:\d\d:\d\d",
    "requeue": r"",
    "signal": r"B:TERM@\d+",
    "output": r"[\w-]*%A_%a\.log",
    "open-mode": r"append",
}


def _directives() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --(\S+)$", SBATCH.read_text(), re.MULTILINE)
    assert len(lines) == SBATCH.read_text().count("#SBATCH"), "each in a line of its own"
    pairs = [line.partition("=")[::2] for line in lines]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _kubernetes() -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Secret", "Job"]
    return {document["kind"]: document for document in documents}


# --- they parse -------------------------------------------------------------------------------------------------------


def test_the_batch_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    assert SBATCH.read_text().startswith("#!/bin/bash\n")


def test_the_directives_are_known_and_stand_where_slurm_reads_them() -> None:
    found = _directives()
    for name, value in found.items():
        assert re.fullmatch(DIRECTIVES[name], value), f"--{name}={value}"
    assert found.keys() == DIRECTIVES.keys()
    assert int(found["signal"].partition("@")[2]) >= 60
    before_commands = SBATCH.read_text().partition("\nset ")[0]
    assert before_commands.count("#SBATCH") == len(found), "sbatch reads none after the first command"
    assert all(line.startswith("#") or not line for line in before_commands.splitlines())


def test_slurm_takes_it_where_there_is_one() -> None:
    """Elsewhere the table above must do."""
    if (
        shutil.which("sbatch")
        and subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode == 0
    ):
        subprocess.run(["sbatch", "--test-only", str(SBATCH), STUDY], check=True)


def test_the_job_replaces_pods_that_are_taken_away_and_no_others_for_ever() -> None:
    job = _kubernetes()["Job"]
    spec = job["spec"]
    assert job["apiVersion"] == "batch/v1"
    assert spec["parallelism"] > 1
    assert "completions" not in spec
    assert "completionMode" not in spec
    assert 0 < spec["backoffLimit"] < 100
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "without which there is no podFailurePolicy"
    rules = spec["podFailurePolicy"]["rules"]
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    (container,) = spec["template"]["spec"]["containers"]
    by_code = {
        code: rule["action"]
        for rule in rules
        if (codes := rule.get("onExitCodes"))
        and codes["operator"] == "In"
        and codes["containerName"] == container["name"]
        for code in codes["values"]
    }
    assert by_code == {130: "Ignore", 2: "FailJob"}


def test_pods_have_time_to_save_a_gpu_and_no_rights() -> None:
    pod = _kubernetes()["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["data"]["readOnly"] is True
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert mounts["data"]["mountPath"] == environment["CAMRI_DATA"]
    writable = [mounts["scratch"]["mountPath"]] * 2
    assert [environment["HOME"], environment["CAMRI_CACHE"][: len(writable[0])]] == writable


def test_the_storage_comes_from_the_secret_which_is_an_example() -> None:
    documents = _kubernetes()
    (container,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    (entry,) = [entry for entry in container["env"] if entry["name"] == STORAGE_VARIABLE]
    reference = entry["valueFrom"]["secretKeyRef"]
    secret = documents["Secret"]
    assert reference["name"] == secret["metadata"]["name"]
    assert secret["stringData"][reference["key"]] == "postgresql+psycopg://USER:PASSWORD@HOST:5432/DATABASE"
    assert STORAGE_VARIABLE not in " ".join([*container["command"], *container["args"]])


# --- their commands run -----------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A study that nobody runs, and what a cluster would give a worker."""

    folder: Path
    store: StudyStore

    def trials(self) -> list[FrozenTrial]:
        return self.store.optuna_study("baseline").get_trials()

    def slurm(self, secret: Path | None = None, mode: int = 0o600) -> tuple[list[str], dict[str, str]]:
        """The script, as Slurm would start it on a node without a GPU."""
        path = secret or self.folder / ".config" / "camri-tune" / "storage"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(mode)
        path.write_text(f"{storage_url(self.store.config)}\n")
        own = {"SLURM_CPUS_PER_TASK": "1", "CAMRI_DEVICE": "cpu", "CAMRI_DATA": str(self.folder / "data")}
        return ["bash", str(SBATCH), STUDY], own

    def kubernetes(self) -> tuple[list[str], dict[str, str]]:
        """The container's command, as a kubelet would start it, on a node without a GPU."""
        (container,) = _kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
        own = {entry["name"]: entry.get("value", storage_url(self.store.config)) for entry in container["env"]}
        assert own["CAMRI_STUDY"] == STUDY
        own |= {"CAMRI_DEVICE": "cpu", "HOME": str(self.folder), "CAMRI_CACHE": os.environ["CAMRI_CACHE"]}
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], word) for word in container["args"]]
        assert not any("$" in word for word in arguments)
        return [*container["command"], *arguments], own


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> Iterator[Place]:
    """One training is queued, long enough to be caught in the act."""
    config = StudyConfig.build({"name": STUDY, "out": tmp_path / "runs", "epochs": 24, "important": "3"})
    config.folder.mkdir(parents=True)
    shutil.copy(empty_database, config.folder / "study.db")
    storage = open_storage(storage_url(config))
    store = StudyStore.create(storage, config, open_dataset(config))
    store.set("stage", "running")
    store.enqueue("baseline", {"learning_rate": 0.004}, seed=0)
    yield Place(tmp_path, store)
    storage.close()


def _environment(place: Place, own: dict[str, str]) -> dict[str, str]:
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CAMRI_STOR")}
    return {**inherited, "HOME": str(place.folder), "PATH": path, **own}


@contextmanager
def _worker(place: Place, command: list[str], own: dict[str, str]) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        command, env=_environment(place, own), cwd=place.folder, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_a_worker_gives_its_training_back_when_it_is_asked_to_end_and_the_next_finishes_it(
    cluster: str, place: Place
) -> None:
    command, own = getattr(place, cluster)()
    with _worker(place, command, own) as process:
        wait_for(lambda: place.trials()[0].user_attrs.get("epoch", 0) >= 2, process)
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert [Path(os.fsdecode(word)).name for word in shown[1:3]] == ["camri-tune", "worker"], "the signal's target"
        assert b"study.db" not in b" ".join(shown), "the storage is on no command line"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "given back" in errors
    (trial,) = place.trials()
    assert (trial.state, trial.user_attrs["failure"]) == (OptunaState.FAIL, "given back: SIGTERM")
    kept = trial.user_attrs["resume"]["epochs"]
    assert kept >= 2

    assert place.store.requeue_interrupted() == 1  # as the run does
    with _worker(place, command, own) as process:
        wait_for(lambda: place.trials()[1].state == OptunaState.COMPLETE, process)
        place.store.set("stage", "done")
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    again = place.trials()[1]
    assert again.user_attrs["resumed_at"] == kept
    assert again.user_attrs["worker"].endswith(f":{process.pid}")


def _refused(place: Place, command: list[str], own: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=_environment(place, own), cwd=place.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert place.trials()[0].state == OptunaState.WAITING
    return done.stderr


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_the_script_refuses_a_password_that_others_can_read(mode: int, place: Place) -> None:
    assert "chmod 600" in _refused(place, *place.slurm(mode=mode))


def test_the_script_refuses_it_behind_a_link_too(place: Place) -> None:
    open_to_all = place.folder / "open"
    command, own = place.slurm(secret=open_to_all, mode=0o644)
    link = place.folder / "link"
    link.symlink_to(open_to_all)
    assert "chmod 600" in _refused(place, command, {**own, "CAMRI_STORAGE_FILE": str(link)})


def test_the_script_says_what_it_lacks(place: Place) -> None:
    command, own = place.slurm()
    assert "the name of the study" in _refused(place, command[:-1], own)
    assert "No such file" in _refused(place, command, {**own, "CAMRI_STORAGE_FILE": "/nowhere"})


def test_the_script_takes_the_secret_from_the_file_that_is_named(place: Place) -> None:
    place.store.set("stage", "done")
    named = place.folder / "elsewhere" / "url"
    command, own = place.slurm(secret=named)
    done = subprocess.run(
        command,
        env=_environment(place, {**own, "CAMRI_STORAGE_FILE": str(named)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

"""The typed record of a study: one source for command-line flags, study files and what is stored with the study."""

import errno
import os
import re
import shlex
import stat
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from camri_tune.errors import InputError

Loss = Literal["ce", "wce", "crwwce", "l2", "arcface", "camri", "cosface-i"]
Model = Literal["compact", "paper-cnn"]
Launcher = Literal["local", "ray"]
BUILT_IN_DATASETS = ("digits", "gtsrb", "cifar10", "mnist", "awa2")

MOST_FINALISTS = 5
MOST_FOLDS = 5
MOST_WORKERS = 1_024  # on one machine
NAME_RULE = "letters, digits, '.', '_' and '-', and start with a letter or digit"
STAGE_SUFFIXES = (".baseline", ".finalists", ".runs")  # what else a run keeps in its storage, named after the study

# Seeds that no two studies and no two uses share: what chose a setting is never what it is judged with.
SEEDS_APART, TUNING_SEED_OFFSET = 100_000, 20_000
MOST_TRIALS, MOST_SEEDS = 50_000, 1_000  # each takes one of the SEEDS_APART

MOST_STUDY_FILE = 2**14  # bytes: a study has some twenty keys, and to parse 64 KiB of hostile TOML takes 10 s
MOST_SHOWN = 300  # characters of foreign text in a message
# What acts on a terminal or a page instead of standing there: control characters, what turns the direction of writing,
# and what stands for bytes that are not UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What may differ when a study is resumed: where and how fast it runs, not what its trials mean.
EXECUTION_FIELDS = frozenset(
    {"trials", "calibrate", "workers", "workers_per_gpu", "device", "launcher", "ray_address", "gpus_per_trial"}
    | {"storage", "artifacts", "name", "out", "data_dir"}
)


class StudyConfig(BaseModel):
    """What is tuned, on what, and how it is judged.

    `tolerance` and `epsilon` are percentage points of accuracy. `important` holds class names, class indices as text,
    or ranks by the baseline's validation recall: `worst1`, `worst2`, …, `median`. Each `floor` is a class and the
    recall that it must keep (see `floor_of`); `max_drop` is how many points the recall of any class may be below the
    baseline's. `epochs` and `image_size` default to what suits the data set, `finalists` to a quarter of the trials, at
    most five. With several `folds` a trial trains one model on each: `auto` asks for them where the important class has
    few validation images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field("digits", min_length=1)
    data_dir: Path = Path("data")
    important: tuple[str, ...] = Field(("worst1",), min_length=1)
    loss: Loss = "camri"
    model: Model = "compact"
    trials: int = Field(20, ge=1, le=MOST_TRIALS)
    epochs: int | None = Field(None, ge=1, le=100_000)
    seeds: int = Field(3, ge=1, le=MOST_SEEDS)
    tolerance: float = Field(0.0, ge=0.0, le=100.0)
    floor: tuple[str, ...] = ()
    max_drop: float | None = Field(None, ge=0.0, le=100.0)
    epsilon: float = Field(0.5, ge=0.0, le=100.0)
    finalists: int | None = Field(None, ge=1, le=MOST_FINALISTS)
    folds: int | Literal["auto"] = "auto"
    calibrate: bool = False
    image_size: int | None = Field(None, ge=8, le=512)
    limit: int | None = Field(None, ge=1, lt=2**31)
    per_group: int | None = Field(None, ge=1, lt=2**31)
    skip_corrupt: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int | Literal["auto"] = "auto"
    workers_per_gpu: int = Field(1, ge=1, le=64)
    device: str = "auto"
    launcher: Launcher = "local"
    ray_address: str | None = None
    gpus_per_trial: float = Field(1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    storage: str | None = Field(None, min_length=1)
    artifacts: str | None = Field(None, min_length=1)
    name: str | None = None
    out: Path = Path("runs")

    @field_validator("important", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        parts = str(value).split(",") if isinstance(value, str | int) else value
        if not isinstance(parts, list | tuple):
            return value
        tokens = tuple(text for part in parts if (text := str(part).strip()))
        if not tokens:
            raise ValueError("must name at least 1 class")
        return tokens

    @field_validator("floor", mode="before")
    @classmethod
    def _floors_are_written_one_way(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(f"{token}>={Decimal(str(share)).normalize():f}" for token, share in map(floor_of, parts))

    @field_validator(
        "trials",
        "epochs",
        "seeds",
        "finalists",
        "image_size",
        "limit",
        "per_group",
        "seed",
        "workers_per_gpu",
        mode="before",
    )
    @classmethod
    def _truth_is_no_count(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a valid integer, not a truth value")
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_is_a_count(cls, value: Any) -> Any:
        return _count_or_auto(value, 0, MOST_WORKERS)

    @field_validator("folds", mode="before")
    @classmethod
    def _folds_is_a_small_count(cls, value: Any) -> Any:
        return _count_or_auto(value, 1, MOST_FOLDS)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", value):  # PyTorch takes cuda:255 for cuda:-1
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not (is_name(value) and len(value) <= 100):
            raise ValueError(f"must be {NAME_RULE}, and no longer than 100 characters")
        if value is not None and value.endswith(STAGE_SUFFIXES):
            raise ValueError(f"must not end in {' or '.join(STAGE_SUFFIXES)}, which name parts of a study")
        return value

    @field_validator("calibrate")
    @classmethod
    def _one_class_is_calibrated(cls, value: bool, info: ValidationInfo) -> bool:
        if value and len(info.data.get("important", ())) > 1:
            raise ValueError("must be left out with several important classes: it adds a bias to the logit of one")
        return value

    @property
    def study_name(self) -> str:
        """The study's name and the name of its folder: `--name`, or data set, loss and important classes."""
        if self.name:
            return self.name
        text = "-".join((self.source_name, self.loss, *self.important))
        return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-")[:100]

    @property
    def source_name(self) -> str:
        """The data set's name, for a folder that folder's own."""
        return self.dataset if self.dataset in BUILT_IN_DATASETS else Path(os.path.realpath(self.dataset)).name

    @property
    def has_local_workers(self) -> bool:
        """Whether a run starts worker processes on its own machine."""
        return self.launcher == "local" and self.workers != 0

    @property
    def folder(self) -> Path:
        """Where this study's files go."""
        return self.out / self.study_name

    @property
    def artifacts_url(self) -> str:
        """Where the files of its trials go: a folder or a URL."""
        return self.artifacts or str(self.folder / "artifacts")

    def replicate_seed(self, index: int) -> int:
        """The seed of the index-th repetition; baseline and finalists share it, which pairs them."""
        return self.seed * SEEDS_APART + index

    @property
    def tuning_seed(self) -> int:
        """The seed with which the baseline's learning rate is tuned, and nothing is judged."""
        return self.seed * SEEDS_APART + TUNING_SEED_OFFSET

    @property
    def tolerance_fraction(self) -> float:
        return self.tolerance / 100

    @property
    def most_finalists(self) -> int:
        """How many of the best trials are retrained: few of few, because each costs as much as `seeds` trials."""
        return self.finalists or min(MOST_FINALISTS, max(1, self.trials // 4))

    @classmethod
    def build(cls, values: dict[str, Any], source: str = "command line") -> Self:
        """Check `values`; an error is one line that names the key, the value, the rule and where it stands."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise InputError(_one_line(error, cls, source)) from None
        for key in ("dataset", "data_dir", "out", "artifacts"):
            path = str(getattr(config, key))
            if reason := why_no_path(path):
                rule = f"be a path that can be opened, which this one cannot: {reason}"
                raise InputError(f"{_place(key, source)} is {shown(path)}, but should {rule}")
        if reason := why_no_path(str(config.folder)):  # both of its parts may be right
            raise InputError(
                f"{_place('name', source)} is {shown(config.study_name)}, but no folder of that name can be in "
                f"{shown(str(config.out))}: {reason}; give another"
            )
        return config

    def command(self, *, with_places: bool = False) -> str:
        """The command that makes this study: options that are not the defaults, without the storage's address.

        `with_places` also says where its files and the data lie on this machine.
        """
        places = () if with_places else ("out", "data_dir", "artifacts")
        speed = ("workers", "workers_per_gpu", "device", "launcher", "ray_address", "gpus_per_trial")
        words = ["camri-tune", "run"]
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if key in ("storage", *speed, *places) or value == field.default:
                continue
            option = f"--{key.replace('_', '-')}"
            if key == "floor":
                words += [word for floor in value for word in (option, floor)]
                continue
            words += [option] if value is True else [option, ",".join(value) if key == "important" else str(value)]
        return shlex.join(words)

    def absolute(self) -> Self:
        """The same study with absolute paths, so that workers may run elsewhere on this machine."""
        known = self.dataset in BUILT_IN_DATASETS or not os.path.exists(self.dataset)
        dataset = self.dataset if known else str(Path(self.dataset).resolve())
        artifacts = self.artifacts
        if artifacts is not None and "://" not in artifacts:
            artifacts = str(Path(artifacts).resolve())
        places = {"data_dir": self.data_dir.resolve(), "out": self.out.resolve(), "artifacts": artifacts}
        return self.model_copy(update={"dataset": dataset, **places})

    def identity(self) -> dict[str, Any]:
        """The fields that give the study's trials their meaning; these must be equal when a study is resumed."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS))


def floor_of(text: object) -> tuple[str, float]:
    """The class (as `important` names it) and the share of 'CLASS>=SHARE', where 0.9 and 90% are the same share.

    A class's name may hold '>=' itself: the last one counts. ValueError where it is no such text.
    """
    token, _, share = text.rpartition(">=") if isinstance(text, str) else ("", "", "")
    digits, percent = share.strip().removesuffix("%").rstrip(), share.rstrip().endswith("%")
    if token.strip() and re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,15})?|\.[0-9]{1,15}", digits):
        value = Decimal(digits) / (100 if percent else 1)
        if value <= 1:
            return token.strip(), round(float(value), 9)
    raise ValueError(
        f"must be a class and the least recall it may have, from 0 to 1, such as 'Stop>=0.9' or 'Stop>=90%', which "
        f"{printable(repr(text), 80)} is not"
    )


def read_study_file(path: Path) -> dict[str, Any]:
    """Read a `studies/*.toml` file into keyword values for `StudyConfig.build`. Raises InputError.

    The file may come from anybody: no more than `MOST_STUDY_FILE` bytes of it are read, and what it holds are plain
    values: text that can be printed, truth values, numbers of at most 64 bits, and lists of them.
    """
    name = f"study file {str(path)!r}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for somebody to write
            raise OSError("it is a directory, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(MOST_STUDY_FILE + 1)
        if len(content) > MOST_STUDY_FILE:
            raise InputError(f"{name} is longer than {MOST_STUDY_FILE:,} bytes; a study file is a few lines of TOML")
        values = tomllib.loads(content.decode())
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; give the path of a .toml file") from None
    except RecursionError:
        raise InputError(f"{name} cannot be read as TOML: it is nested too deeply; its keys are plain values") from None
    except (OSError, ValueError) as error:  # the latter also from a number of thousands of digits
        raise InputError(f"{name} cannot be read as TOML: {printable(str(error))}") from None
    if "ray_address" in values:
        raise InputError(
            f"{name} must not hold 'ray_address': whoever owns that cluster could run code here; give --ray-address"
        )
    for key, value in values.items():
        if not all(map(_is_plain, value if isinstance(value, list) else [value])):
            rule = "plain text, true or false, a number of at most 64 bits, or a list of such values"
            raise InputError(
                f"{name}: {shown(key)} is {'***' if key == 'storage' else shown(value)}, but should be {rule}"
            )
    return values


def is_printable(text: str) -> bool:
    """Whether `text` can be shown as it is: no control characters, no overrides of its direction, and UTF-8."""
    return _UNPRINTABLE.search(text) is None


def printable(text: str, most: int = MOST_SHOWN) -> str:
    """`text` from elsewhere as a message may hold it: in one line, with escapes in the place of what acts on a
    terminal, and no more than `most` characters of it."""
    escaped = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[: most + 1])
    return escaped if len(escaped) <= most else f"{escaped[:most]}…"


def shown(value: object) -> str:
    """Any value from elsewhere, as a message may hold it."""
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of tables within each other
        return f"a value of type {type(value).__name__} that is too large to show"


def is_name(text: str) -> bool:
    """Whether a study can be called so. Those of a comparison may be long: `NAME-DATASET.CLASS.LOSS`."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return is_printable(value)
    if isinstance(value, int):
        return value.bit_length() < 64
    return isinstance(value, float)


def why_no_path(path: str) -> str | None:
    """Why no file can be at `path`, whatever is made there."""
    try:
        path.encode()
        os.stat(path)
    except ValueError:
        return "it holds a zero byte, or bytes that are not UTF-8"
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return error.strerror
    return None


def _one_line(error: ValidationError, model: type[BaseModel], source: str) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        where = f"{source}: " if source != "command line" else ""
        return f"{where}unknown key {shown(key)}; the keys are {', '.join(sorted(model.model_fields))}"
    rule = re.sub(r"^(Value error, must|\w+ should) ", "", first["msg"])
    rule = re.sub(r"^Input is not (a valid path) .*", r"be \1", rule)
    secret = key == "storage" and first["input"]  # it may hold a password
    return f"{_place(key, source)} is {'***' if secret else shown(first['input'])}, but should {printable(rule)}"


def _place(key: str, source: str) -> str:
    return f"--{key.replace('_', '-')}" if source == "command line" else f"{source}: {key}"


def _count_or_auto(value: Any, least: int, most: int) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    counts = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    if value != "auto" and not counts:
        raise ValueError(f"must be a whole number from {least} to {most:,}, or 'auto'")
    return value

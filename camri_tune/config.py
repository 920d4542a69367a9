"""The typed record of a study: one source for command-line flags, study files and what is stored with the study."""

import csv
import errno
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from camri_tune.errors import InputError
from camri_tune.files import own_path
from camri_tune.ranges import Bounds, Searchable, SearchRange, is_searched, read_searchable, read_words, text_of

Loss = Literal["ce", "wce", "crwwce", "l2", "arcface", "camri", "cosface-i"]
Model = str  # one of ours, or of a library's: see `require_model_name`
HEAD = "head"  # no network: the data set has embeddings, and the head is all there is
BUILT_IN_MODELS = ("compact", "wide", "paper-cnn", HEAD)
MOST_MODEL = 200  # characters of the name of a network of the user's own
Optimizer = Literal["muon", "adamw", "adam", "sgd"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]
Launcher = Literal["local", "ray"]
BUILT_IN_DATASETS = ("digits", "gtsrb", "cifar10", "mnist", "awa2")
DATA_FILES = (".csv", ".npz")  # endings of files that are data sets

MOST_FINALISTS = 5
MOST_FOLDS = 5
MOST_WORKERS = 1_024  # on one machine
NAME_RULE = "letters, digits, '.', '_' and '-', and start with a letter or digit"
STAGE_SUFFIXES = (".baseline", ".finalists", ".runs")  # what else a run keeps in its storage, named after the study

# Seeds that no two studies and no two uses share: what chose a setting is never what it is judged with.
SEEDS_APART, TUNING_SEED_OFFSET = 100_000, 20_000
MOST_TRIALS, MOST_SEEDS = 50_000, 1_000  # each takes one of the SEEDS_APART

MOST_STUDY_FILE = 2**14  # bytes: a study has some twenty keys, and to parse 64 KiB of hostile TOML takes 10 s
MOST_PATTERN = 200  # characters
MOST_SHOWN = 300  # characters of foreign text in a message
# What acts on a terminal or a page instead of standing there: control characters, what turns the direction of writing,
# and what stands for bytes that are not UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# How a model is trained, by the names of a recipe's fields (training.py); None leaves what belongs to the network.
RECIPE_FIELDS = (
    *("trainable", "backbone_lr", "optimizer", "weight_decay", "schedule", "warmup"),
    *("batch_size", "augmentation", "precision", "label_smoothing"),
)
STRENGTHS = {"none": 0.0, "default": 1.0, "strong": 1.5}  # of augmentation, in words

# Numbers that a study may fix, or search within these bounds.
SEARCHABLE = {
    "learning_rate": Bounds(1e-5, 1.0),
    "scale": Bounds(0.1, 1_000.0),
    "margin": Bounds(0.0, 1.99),
    "weight": Bounds(0.01, 1_000.0),
    "w_fn": Bounds(0.01, 1_000.0),
    "w_fp": Bounds(0.0, 1_000.0),
    "backbone_lr": Bounds(1e-6, 10.0),
    "weight_decay": Bounds(0.0, 10.0),
    "warmup": Bounds(0.0, 0.9),
    "batch_size": Bounds(2, 65_536, whole=True),
    "epochs": Bounds(1, 100_000, whole=True),
    "augmentation": Bounds(0.0, 3.0),
    "label_smoothing": Bounds(0.0, 0.9),
}
WORDS: dict[str, tuple[str, ...]] = {
    "optimizer": get_args(Optimizer),
    "schedule": get_args(Schedule),
    "precision": get_args(Precision),
}

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
    few validation images. `group_by`, a pattern, is searched in the paths of a data set's files, and its group named
    `group` says which of them show one object.

    `weights` is a file that every training starts from, the baseline's too; `trainable` says which of the network's
    parts change (`all`; `last:N` the last N, see `models.parts_of`; `head` none of them), and `backbone_lr` is their
    learning rate as a factor of the head's. The rest of the recipe defaults to the network's own: `warmup` is a share
    of the steps, `augmentation` a factor of the data set's changes (or `none`, `default`, `strong`).

    The numbers in `SEARCHABLE` are fixed by one number, and searched by a `SearchRange` or several numbers to choose
    from, and `WORDS` likewise by one or several; without either, `learning_rate` is searched about the baseline's, and
    a loss's own parameters over their usual range. What is fixed of the recipe is the baseline's as well. Where it is
    searched, the baseline has the network's own value: it is not tuned beyond its learning rate, which is tuned unless
    it is fixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field("digits", min_length=1)
    data_dir: Path = Path("data")
    important: tuple[str, ...] = Field(("worst1",), min_length=1)
    loss: Loss = "camri"
    model: Model = "compact"
    weights: Path | None = None
    trainable: str = "all"
    learning_rate: Searchable | None = None
    scale: Searchable | None = None
    margin: Searchable | None = None
    weight: Searchable | None = None
    w_fn: Searchable | None = None
    w_fp: Searchable | None = None
    backbone_lr: Searchable = 1.0
    optimizer: Optimizer | tuple[Optimizer, ...] | None = None
    weight_decay: Searchable | None = None
    schedule: Schedule | tuple[Schedule, ...] | None = None
    warmup: Searchable | None = None
    batch_size: Searchable | None = None
    augmentation: Searchable | None = None
    precision: Precision | tuple[Precision, ...] = "auto"
    label_smoothing: Searchable = 0.0
    trials: int = Field(20, ge=1, le=MOST_TRIALS)
    epochs: int | Searchable | None = None
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
    group_by: str | None = Field(None, min_length=1, max_length=MOST_PATTERN)
    skip_corrupt: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int | Literal["auto"] = "auto"
    workers_per_gpu: int | Literal["auto"] = "auto"
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
        parts = _split(str(value)) if isinstance(value, str | int) else value
        if not isinstance(parts, list | tuple):
            return value
        tokens = tuple(text for part in parts if (text := str(part).strip()))
        if not tokens:
            raise ValueError("must name at least 1 class")
        return tokens

    @field_validator(*SEARCHABLE, mode="before")
    @classmethod
    def _number_or_search(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a validator of fields"
        if info.field_name == "augmentation" and isinstance(value, str):
            value = STRENGTHS.get(value, value)
        found = None if value is None else read_searchable(value, SEARCHABLE[info.field_name])
        return int(found) if info.field_name == "epochs" and isinstance(found, float) else found

    @field_validator(*WORDS, mode="before")
    @classmethod
    def _word_or_choice(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a validator of fields"
        return None if value is None else read_words(value, WORDS[info.field_name])

    @field_validator("floor", mode="before")
    @classmethod
    def _floors_are_written_one_way(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(f"{token}>={Decimal(str(share)).normalize():f}" for token, share in map(floor_of, parts))

    @field_validator(
        "trials",
        "seeds",
        "finalists",
        "image_size",
        "limit",
        "per_group",
        "seed",
        mode="before",
    )
    @classmethod
    def _truth_is_no_count(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a valid integer, not a truth value")
        return value

    @field_validator("tolerance", "max_drop", "epsilon", "gpus_per_trial", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a valid number, not a truth value")
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_is_a_count(cls, value: Any) -> Any:
        return _count_or_auto(value, 0, MOST_WORKERS)

    @field_validator("workers_per_gpu", mode="before")
    @classmethod
    def _workers_per_gpu_is_a_count(cls, value: Any) -> Any:
        return _count_or_auto(value, 1, 64)

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

    @field_validator("group_by")
    @classmethod
    def _pattern_is_text(cls, value: str | None) -> str | None:
        if value is not None and not is_printable(value):
            raise ValueError("must be a pattern without control characters")
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return require_model_name(value)

    @field_validator("weights", "trainable", "backbone_lr", "augmentation", "image_size")
    @classmethod
    def _there_is_a_network(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a validator of fields"
        if info.data.get("model") == HEAD and value != cls.model_fields[info.field_name].default:
            raise ValueError("must be left out with --model head, which has neither a network nor images")
        return value

    @field_validator("backbone_lr")
    @classmethod
    def _something_of_it_learns(cls, value: Searchable, info: ValidationInfo) -> Searchable:
        if info.data.get("trainable") == "head" and value != cls.model_fields["backbone_lr"].default:
            raise ValueError("must be left out with --trainable head: nothing of the network changes")
        return value

    @field_validator("trainable")
    @classmethod
    def _known_parts(cls, value: str) -> str:
        if not re.fullmatch(r"all|head|last:[1-9][0-9]{0,3}", value):
            raise ValueError("must be all, head (and nothing of the network), or last:N (and its last N parts)")
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
        """The data set's name, for a folder that folder's own, for a file without its ending."""
        if self.dataset in BUILT_IN_DATASETS:
            return self.dataset
        path = _own_path(self.dataset)
        return path.stem if is_data_file(path) else path.name

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
    def fixed_learning_rate(self) -> float | None:
        """The learning rate of every training, where there is but one."""
        return self.learning_rate if isinstance(self.learning_rate, float) else None

    @property
    def tolerance_fraction(self) -> float:
        return self.tolerance / 100

    @property
    def embeddings_learn(self) -> bool:
        """Whether anything of the network is trained beside the head."""
        return self.model != HEAD and self.trainable != "head"

    @property
    def most_finalists(self) -> int:
        """How many of the best trials are retrained: few of few, because each costs as much as `seeds` trials."""
        return self.finalists or min(MOST_FINALISTS, max(1, self.trials // 4))

    def epochs_of(self, usual: int, params: Mapping[str, Any] = MappingProxyType({})) -> int:
        """The epochs of a training with these parameters, without any of the baseline's; `usual` is the data set's."""
        fixed = None if is_searched(self.epochs) else self.epochs
        return int(params.get("epochs", fixed or usual))

    def most_epochs(self, usual: int) -> int:
        """The epochs of the longest training of the study."""
        if isinstance(self.epochs, SearchRange):
            return max(usual, int(self.epochs.high))
        return int(max(usual, *self.epochs)) if isinstance(self.epochs, tuple) else self.epochs_of(usual)

    @classmethod
    def build(cls, values: dict[str, Any], source: str = "command line") -> Self:
        """Check `values`; an error is one line that names the key, the value, the rule and where it stands."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise InputError(_one_line(error, cls, source)) from None
        for key in ("dataset", "data_dir", "out", "artifacts", "weights"):
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
        for key in type(self).model_fields:
            if key not in ("storage", *speed, *places):
                words += self.words_of(key)
        return shlex.join(words)

    def words_of(self, key: str) -> list[str]:
        """A field's option and what it is given, as words of a command; none where it is the default."""
        value, option = getattr(self, key), f"--{key.replace('_', '-')}"
        if value == type(self).model_fields[key].default:
            return []
        if key == "floor":
            return [word for floor in value for word in (option, floor)]
        if key in SEARCHABLE or key in WORDS:
            value = text_of(value)
        return [option] if value is True else [option, _joined(value) if key == "important" else str(value)]

    def in_this_environment(self) -> Self:
        """The same study, its places as $CAMRI_DATA and $CAMRI_STORAGE say where it says nothing. Raises InputError."""
        found = {}
        for key, variable in (("data_dir", "CAMRI_DATA"), ("storage", "CAMRI_STORAGE")):
            if key not in self.model_fields_set and (named := os.environ.get(variable)):
                found[key] = getattr(self.build({key: named}, source=f"${variable}"), key)
        return self.model_copy(update=found)

    def absolute(self) -> Self:
        """The same study with absolute paths, so that workers may run elsewhere on this machine."""
        known = self.dataset in BUILT_IN_DATASETS or not os.path.exists(self.dataset)
        dataset = self.dataset if known else str(_own_path(self.dataset))
        artifacts = self.artifacts
        if artifacts is not None and "://" not in artifacts:
            artifacts = str(Path(artifacts).resolve())
        places = {"data_dir": self.data_dir.resolve(), "out": self.out.resolve(), "artifacts": artifacts}
        places["weights"] = self.weights and own_path(self.weights)
        return self.model_copy(update={"dataset": dataset, **places})

    def identity(self) -> dict[str, Any]:
        """The fields that give the study's trials their meaning; these must be equal when a study is resumed.

        Data set and weights stand in it by their paths, where a study is stored by their content.
        """
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS))


def names_a_database(text: str) -> bool:
    """Whether a text holds the URL of a database; taken for a path it may have lost a slash."""
    return re.search(r"\b(sqlite|postgres|postgresql|mysql|mariadb|oracle|mssql|grpc)(\+\w+)?:/", text) is not None


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
    if isinstance(model := values.get("model"), str) and is_own_model(model):
        raise InputError(
            f"{name} must not hold the network {model!r}, which is code that would be executed here; take that line "
            f"out, and give --model {model}"
        )
    if "ray_address" in values:
        raise InputError(
            f"{name} must not hold 'ray_address': whoever owns that cluster could run code here; give --ray-address"
        )
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(value, dict) and key in SEARCHABLE:
            items = list(value.values())
        if not all(map(_is_plain, items)):
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


def _own_path(dataset: str) -> Path:
    """Where a data set lies; of a file that is a link, the link's own place."""
    return own_path(dataset) if is_data_file(dataset) else Path(os.path.realpath(dataset))


def _split(text: str) -> list[str]:
    """What stands between commas, as in a row of CSV: in double quotes a class's name may have some itself."""
    try:
        return next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error:  # a line break, which no class's name has
        return text.split(",")


def _joined(names: Sequence[str]) -> str:
    """The same the other way round."""
    return ",".join('"' + name.replace('"', '""') + '"' if "," in name or name[0] == '"' else name for name in names)


def is_data_file(path: str | Path) -> bool:
    """Whether a data set of this path is a file, and no folder."""
    return os.path.splitext(path)[1].lower() in DATA_FILES and not os.path.isdir(path)


def require_model_name(name: Model) -> Model:
    """A name that a network may have, whether or not there is one: which it is, a library says when it is imported.

    Raises ValueError with the rule.
    """
    of_a_library = re.fullmatch(r"(torchvision|timm):[a-z0-9_.]{1,100}", name)
    if name not in BUILT_IN_MODELS and not of_a_library and not is_own_model(name):
        raise ValueError(
            "must be 'compact', 'wide', 'paper-cnn', torchvision:NAME (such as torchvision:resnet18), timm:NAME, "
            "MODULE:FUNCTION of your own, or 'head' for embeddings"
        )
    return name


def is_own_model(name: Model) -> bool:
    """Whether it names a network of the user's own, `package.module:factory` (see own_networks)."""
    word = r"[A-Za-z_][A-Za-z0-9_]*"
    found = re.fullmatch(rf"({word}(?:\.{word})*):{word}", name[: MOST_MODEL + 1])
    return found is not None and len(name) <= MOST_MODEL and found[1] not in ("torchvision", "timm")


def package_of(name: Model) -> str | None:
    """The library that a network comes from, which takes seconds to import; None for ours and the user's own."""
    library = name.partition(":")[0]
    return library if library in ("torchvision", "timm") else None


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

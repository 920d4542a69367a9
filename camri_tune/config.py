"""The typed record of a study: one source for command-line flags, study files and what is stored with the study."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from camri_tune.errors import InputError

Loss = Literal["ce", "wce", "crwwce", "l2", "arcface", "camri", "cosface-i"]
Model = Literal["compact", "paper-cnn"]
BUILT_IN_DATASETS = ("digits", "gtsrb", "cifar10", "mnist", "awa2")

MOST_FINALISTS = 5
MOST_FOLDS = 5
STAGE_SUFFIXES = (".baseline", ".finalists")  # a run's two other queues, named after the study

# Seeds that no two studies and no two uses share: what chose a setting is never what it is judged with.
SEEDS_APART, TUNING_SEED_OFFSET = 100_000, 20_000

# What may differ when a study is resumed: where and how fast it runs, not what its trials mean.
EXECUTION_FIELDS = frozenset({"trials", "calibrate", "workers", "device", "storage", "name", "out", "data_dir"})


class StudyConfig(BaseModel):
    """What is tuned, on what, and how it is judged.

    `tolerance` and `epsilon` are percentage points of accuracy. `important` holds class names, class indices as
    text, or ranks by the baseline's validation recall: `worst1`, `worst2`, …, `median`. `epochs` and `image_size`
    default to what suits the data set, `finalists` to a quarter of the trials, at most five. With several `folds`
    a trial trains one model on each: `auto` asks for them where the important class has few validation images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field("digits", min_length=1)
    data_dir: Path = Path("data")
    important: tuple[str, ...] = Field(("worst1",), min_length=1)
    loss: Loss = "camri"
    model: Model = "compact"
    trials: int = Field(20, ge=1)
    epochs: int | None = Field(None, ge=1)
    seeds: int = Field(3, ge=1)
    tolerance: float = Field(0.0, ge=0.0, le=100.0)
    epsilon: float = Field(0.5, ge=0.0, le=100.0)
    finalists: int | None = Field(None, ge=1, le=MOST_FINALISTS)
    folds: int | Literal["auto"] = "auto"
    calibrate: bool = False
    image_size: int | None = Field(None, ge=8, le=512)
    limit: int | None = Field(None, ge=1)
    per_group: int | None = Field(None, ge=1)
    skip_corrupt: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int | Literal["auto"] = "auto"
    device: str = "auto"
    storage: str | None = None
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

    @field_validator(
        "trials", "epochs", "seeds", "finalists", "image_size", "limit", "per_group", "seed", mode="before"
    )
    @classmethod
    def _truth_is_no_count(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a valid integer, not a truth value")
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_is_a_count(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        counts = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value != "auto" and not counts:
            raise ValueError("must be a whole number of at least 1, or 'auto'")
        return value

    @field_validator("folds", mode="before")
    @classmethod
    def _folds_is_a_small_count(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        counts = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_FOLDS
        if value != "auto" and not counts:
            raise ValueError(f"must be a whole number from 1 to {MOST_FOLDS}, or 'auto'")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
            raise ValueError("must be letters, digits, '.', '_' and '-', and start with a letter or digit")
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
        return self.dataset if self.dataset in BUILT_IN_DATASETS else Path(self.dataset).resolve().name

    @property
    def folder(self) -> Path:
        """Where this study's files go."""
        return self.out / self.study_name

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
            return cls(**values)
        except ValidationError as error:
            raise InputError(_one_line(error, cls, source)) from None

    def command(self, *, with_places: bool = False) -> str:
        """The command that makes this study: options that are not the defaults, without the storage's address.

        `with_places` also says where its files and the data lie on this machine.
        """
        places = () if with_places else ("out", "data_dir")
        words = ["camri-tune", "run"]
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if key in ("storage", "workers", "device", *places) or value == field.default:
                continue
            option = f"--{key.replace('_', '-')}"
            words += [option] if value is True else [option, ",".join(value) if key == "important" else str(value)]
        return shlex.join(words)

    def absolute(self) -> Self:
        """The same study with absolute paths, so that workers may run elsewhere on this machine."""
        known = self.dataset in BUILT_IN_DATASETS or not Path(self.dataset).exists()
        dataset = self.dataset if known else str(Path(self.dataset).resolve())
        return self.model_copy(
            update={"dataset": dataset, "data_dir": self.data_dir.resolve(), "out": self.out.resolve()}
        )

    def identity(self) -> dict[str, Any]:
        """The fields that give the study's trials their meaning; these must be equal when a study is resumed."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS))


def read_study_file(path: Path) -> dict[str, Any]:
    """Read a `studies/*.toml` file into keyword values for `StudyConfig.build`."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise InputError(f"study file {str(path)!r} does not exist; give the path of a .toml file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"study file {str(path)!r} cannot be read as TOML: {error}") from None


def _one_line(error: ValidationError, model: type[BaseModel], source: str) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "?"
    where = f"{source}: " if source != "command line" else ""
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {key!r}; the keys are {', '.join(sorted(model.model_fields))}"
    option = f"--{key.replace('_', '-')}" if source == "command line" else key
    rule = re.sub(r"^(Value error, must|\w+ should) ", "", first["msg"])
    return f"{where}{option} is {first['input']!r}, but should {rule}"

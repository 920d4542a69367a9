"""The commands: parse, call, print. What they do lives in the modules they call.

Heavy imports (torch, optuna) wait until a command needs them, so that help and usage errors come at once.
"""

import atexit
import gc
import inspect
import io
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Optional, TypeVar

import typer
from pydantic import ValidationError

from camri_tune import prefork
from camri_tune.config import (
    MOST_WORKERS,
    NAME_RULE,
    StudyConfig,
    is_name,
    names_a_database,
    printable,
    read_study_file,
    shown,
)
from camri_tune.errors import CamriTuneError, InputError
from camri_tune.interrupts import heard
from camri_tune.memory import keep_freed_memory
from camri_tune.own_networks import allow

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from camri_tune.result import Result
    from camri_tune.table1 import Table

INTERRUPTED_EXIT_CODE = 130
NO_MODEL_EXIT_CODE = 3

app = typer.Typer(
    name="camri-tune",
    help="Raise the recall of the class that must not be missed, keep accuracy at the cross-entropy baseline's.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RESUMING = {"run", "compare", "worker"}  # commands that go on where they were interrupted

JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output; nothing else there.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Where built-in data sets lie or are downloaded to (default: $CAMRI_DATA, else ./data)."),
]

GroupByOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Which files show one object: what the pattern's (?P<group>…) finds in their paths, say patient numbers.",
    ),
]
FinalistsOption = Annotated[
    int | None,
    typer.Option(help="Best trials that are retrained on fresh seeds (default: a quarter of the trials, at most 5)."),
]

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Network: compact, wide, paper-cnn, torchvision:NAME, timm:NAME, MODULE:FUNCTION or head (for embeddings)."
    ),
]
OwnModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODULE:FUNCTION", help="Import this network of your own, if that is what the model is."
    ),
]

ImageSizeOption = Annotated[
    int | None,
    typer.Option(help="Side in pixels that images are resized to (default: the data set's, or the network's)."),
]

WorkersOption = Annotated[
    str | None, typer.Option(help="Worker processes, or auto; 0 leaves the work to `camri-tune worker`.")
]
WorkersPerGpuOption = Annotated[
    str | None,
    typer.Option(help="Workers that share a GPU, or auto: 2 of the network compact, 1 of others."),
]
LauncherOption = Annotated[
    str | None, typer.Option(help="local: workers are processes here. ray: Ray places them on its cluster.")
]
RayAddressOption = Annotated[
    str | None, typer.Option(help="Ray's cluster, as for ray.init (default: $RAY_ADDRESS, else one on this machine).")
]
GpusPerTrialOption = Annotated[float | None, typer.Option(help="Share of a GPU that each of Ray's workers gets.")]
ArtifactsOption = Annotated[
    str | None,
    typer.Option(help="Where checkpoints go: a folder or s3://bucket/prefix (default: the study's own folder)."),
]

# How a network is trained: `run` and `compare` take these alike. Each is a field of StudyConfig.
RECIPE_OPTIONS: dict[str, tuple[type, str]] = {
    "weights": (Path, "Weights to start from: .safetensors, or a state dict as .pt or .pth."),
    "trainable": (str, "What of the network changes: all, last:N (its last N parts), or head (nothing of it)."),
    "backbone_lr": (str, "The network's learning rate as a factor of the head's (default: 1)."),
    "learning_rate": (
        str,
        "A number, or what to search: LOW..HIGH, 'LOW..HIGH log' or A,B,C. So all numbers here.",
    ),
    "scale": (
        str,
        "Scale of a cosine loss (default: searched from 1 to 8 times sqrt(2) log(classes - 1), of two classes as of "
        "three, or from 4 to 64 where nothing of the network changes).",
    ),
    "margin": (str, "Margin in radians (default: searched from 0 to 0.6)."),
    "weight": (str, "Weight of the important class in wce (default: searched from 1 to 32)."),
    "w_fn": (str, "Weight of what it lacks of its images in crwwce (default: searched from 1 to 32)."),
    "w_fp": (str, "Weight of what wrong classes get of its images in crwwce (default: searched from 0.03 to 8)."),
    "epochs": (str, "Epochs of a training (default: the data set's own)."),
    "optimizer": (str, "muon (with adamw for all but matrices), adamw, adam, or sgd with Nesterov's momentum."),
    "weight_decay": (str, "Weight decay, of weights alone: not of norms and biases."),
    "schedule": (str, "What the learning rate does after its warmup: linear, cosine (both to zero), or constant."),
    "warmup": (str, "Share of the steps in which the learning rate rises."),
    "batch_size": (str, "Images of a step."),
    "augmentation": (str, "none, default (as the data set has it), strong, or a factor."),
    "precision": (str, "auto, bfloat16 or float32, of the network; the head is in float32."),
    "label_smoothing": (str, "Share of the target that goes to all classes alike: moves margins and calibration."),
}
Command = TypeVar("Command", bound=Callable[..., None])


def with_recipe(command: Command) -> Command:
    """Give a command, which takes them as `**recipe`, the options in RECIPE_OPTIONS."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = []
    for name, (kind, text) in RECIPE_OPTIONS.items():
        option = Annotated[Optional[kind], typer.Option(help=text)]  # type: ignore[valid-type]  # noqa: UP045
        more.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
    command.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return command


StudyArgument = Annotated[
    str | None, typer.Argument(help="A study's name, or its folder (default: the one worked on last).")
]
OutOption = Annotated[Path, typer.Option(help="Folder for studies.")]
StorageOption = Annotated[
    str | None,
    typer.Option(envvar="CAMRI_STORAGE", help="Database URL of the study (default: SQLite in its folder)."),
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"camri-tune {metadata.version('camri-tune')}")
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@with_recipe
def run(
    context: typer.Context,
    study: Annotated[Path | None, typer.Argument(help="A study file (.toml); options given here win over it.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="digits, gtsrb, cifar10, mnist, awa2, or a folder, .csv or .npz.")
    ] = None,
    data_dir: DataDirOption = None,
    important: Annotated[
        str | None,
        typer.Option(help="Class that must not be missed: index, name, worst1, worst2, median; several with commas."),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="camri, l2, arcface, cosface-i, wce, crwwce or ce.")] = None,
    model: ModelOption = None,
    trials: Annotated[int | None, typer.Option(help="Trainings of the search.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds for the baseline and for each finalist.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Points of accuracy that may be given up.")] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS>=SHARE",
            help="Least recall of a class, such as 'Stop>=0.9' or 'Stop>=90%' (with quotes); may be repeated.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of recall that any class may fall below the baseline's.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Points of test accuracy: the certificate's margin.")] = None,
    finalists: FinalistsOption = None,
    folds: Annotated[
        str | None,
        typer.Option(help="Models of each trial, on so many folds, or auto: 1 unless the class has few images."),
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option("--calibrate", help="Add a bias to the important class's logit, tuned on validation.")
    ] = None,
    image_size: ImageSizeOption = None,
    limit: Annotated[int | None, typer.Option(help="Use at most N training images: for trying things out.")] = None,
    per_group: Annotated[int | None, typer.Option(help="Train on at most N images of each group (track).")] = None,
    group_by: GroupByOption = None,
    skip_corrupt: Annotated[bool | None, typer.Option("--skip-corrupt", help="Leave unreadable images out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Base of all random numbers.")] = None,
    workers: WorkersOption = None,
    workers_per_gpu: WorkersPerGpuOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    launcher: LauncherOption = None,
    ray_address: RayAddressOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    artifacts: ArtifactsOption = None,
    storage: StorageOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the study and of its folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for studies (default: runs).")] = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    **recipe: Any,
) -> None:
    """Tune, select and export: the whole job. The same command again resumes."""
    options = dict(locals())
    for key in ("context", "study", "as_json", "quiet", "recipe"):
        del options[key]
    config = _config(context, study, options | recipe)
    prefork.begin_for(config, [config.dataset])  # it imports while this process does

    from camri_tune.console import Console  # noqa: PLC0415
    from camri_tune.pipeline import run as run_study  # noqa: PLC0415

    result = run_study(config, Console(quiet=quiet))
    _show(result, as_json)
    if result.best is None:
        raise typer.Exit(NO_MODEL_EXIT_CODE)


@app.command()
@with_recipe
def compare(
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="Data sets, separated by commas; see `run`.")] = "digits",
    data_dir: DataDirOption = None,
    important: Annotated[str, typer.Option(help="Classes, each a column of its own.")] = "worst1,worst2,median",
    methods: Annotated[
        str, typer.Option(help="Any of ce, threshold, wce, crwwce, l2, arcface, camri, cosface-i.")
    ] = "ce,threshold,wce,crwwce,l2,arcface,camri,cosface-i",
    protocol: Annotated[
        str, typer.Option(help="ours: validation chooses. paper: chosen on test, as the paper did, labelled as such.")
    ] = "ours",
    model: ModelOption = None,
    trials: Annotated[int | None, typer.Option(help="Trainings of the search, for each method and class.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds for the baseline and for each finalist.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Points of accuracy that may be given up.")] = None,
    finalists: FinalistsOption = None,
    image_size: ImageSizeOption = None,
    limit: Annotated[int | None, typer.Option(help="Use at most N training images.")] = None,
    per_group: Annotated[int | None, typer.Option(help="Train on at most N images of each group (track).")] = None,
    group_by: GroupByOption = None,
    skip_corrupt: Annotated[bool | None, typer.Option("--skip-corrupt", help="Leave unreadable images out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Base of all random numbers.")] = None,
    workers: WorkersOption = None,
    workers_per_gpu: WorkersPerGpuOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    launcher: LauncherOption = None,
    ray_address: RayAddressOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    artifacts: ArtifactsOption = None,
    storage: StorageOption = None,
    name: Annotated[str, typer.Option(help="Name of the comparison and of its folder.")] = "compare",
    out: Annotated[Path | None, typer.Option(help="Folder for studies (default: runs).")] = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    **recipe: Any,
) -> None:
    """Many methods under one protocol: the paper's Table 1. The same command again resumes."""
    options = dict(locals())
    for key in ("context", "dataset", "methods", "protocol", "as_json", "quiet", "recipe"):
        del options[key]
    config = _config(context, None, options | recipe)

    from camri_tune.table1 import read_datasets, read_methods, read_protocol  # noqa: PLC0415

    datasets, chosen, rules = read_datasets(dataset), read_methods(methods), read_protocol(protocol)
    prefork.begin_for(config, datasets)

    from camri_tune.comparison import compare as compare_methods  # noqa: PLC0415
    from camri_tune.console import Console  # noqa: PLC0415

    table = compare_methods(config, datasets=datasets, methods=chosen, protocol=rules, console=Console(quiet=quiet))
    _show_comparison(table, as_json)


@app.command()
def status(
    name: StudyArgument = None,
    out: OutOption = Path("runs"),
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """A study at a glance, also while it runs in another terminal."""
    from camri_tune.overview import find_study, read_overview  # noqa: PLC0415
    from camri_tune.tables import status_view  # noqa: PLC0415

    overview = read_overview(find_study(name, out=out, storage=storage))
    if as_json:
        print(json.dumps(overview.as_json(), indent=2))
        return
    _result_console(as_json).print(status_view(overview), soft_wrap=True)


@app.command()
def report(
    name: StudyArgument = None,
    out: OutOption = Path("runs"),
    storage: StorageOption = None,
) -> None:
    """Write a study's report.html from what is stored, also while it runs, and print its path."""
    from camri_tune.overview import find_study  # noqa: PLC0415
    from camri_tune.report import write_report  # noqa: PLC0415

    print(write_report(find_study(name, out=out, storage=storage)))


@app.command()
def worker(
    study: Annotated[str, typer.Option(help="Name of the study to join.")],
    storage: Annotated[str | None, typer.Option(envvar="CAMRI_STORAGE", help="Its database URL.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_WORKERS, help="Threads on a CPU (default: PyTorch's own).")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where built-in data sets lie (default: the study's own folder if it is here, else $CAMRI_DATA)."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Where the study's weights lie here (default: where they lie for the run).")
    ] = None,
    model: OwnModelOption = None,
    wait: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds to wait for the study to be there, and for a run to go on with it."),
    ] = 0.0,
) -> None:
    """Join a study with one more process, on any machine that reaches its storage and its files."""
    from camri_tune.database import require_sense  # noqa: PLC0415
    from camri_tune.worker import stopping_on_signals, work  # noqa: PLC0415

    if not storage:
        raise InputError("no storage: give --storage URL, or set CAMRI_STORAGE")
    # What no waiting mends is said at once.
    require_sense(storage)
    if not is_name(study):
        raise InputError(f"--study is {shown(study)}, but should be {NAME_RULE}; give the name that its run printed")
    places = {"data_dir": data_dir, "weights": weights}
    StudyConfig.build({"device": device, **{key: path for key, path in places.items() if path is not None}})
    # Numbers past those of the run's own workers, so that no two samplers share a seed.
    index = int.from_bytes(os.urandom(3)) + 1_000
    with stopping_on_signals() as stop:
        work(
            storage_url=storage,
            name=study,
            device=device,
            threads=threads,
            data_dir=data_dir,
            weights=weights,
            model=model,
            index=index,
            patience=wait,
            asked_to_stop=stop,
        )


@app.command()
def dashboard(
    name: StudyArgument = None,
    out: OutOption = Path("runs"),
    storage: StorageOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free one.")] = 8080,
) -> None:
    """Optuna's dashboard on a study, also while it runs, with the accuracy constraint and the feasible best."""
    from camri_tune.console import Console  # noqa: PLC0415
    from camri_tune.dashboard import serve  # noqa: PLC0415
    from camri_tune.overview import find_study, read_overview  # noqa: PLC0415
    from camri_tune.stages import show  # noqa: PLC0415

    store = find_study(name, out=out, storage=storage)
    if not read_overview(store).running:  # a run keeps them fresh, unless it was killed
        show(store, Console())
    serve(store, host=host, port=port)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="An exported model, such as runs/NAME/best.")],
    data: Annotated[
        str | None,
        typer.Option(help="Class folders, a .csv or .npz, a data set's name, or where one lies (default: as trained)."),
    ] = None,
    data_dir: DataDirOption = None,
    model: OwnModelOption = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Leave unreadable images out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure an exported model; on its own test part this reproduces the stored figures."""
    from camri_tune.evaluation import evaluate_bundle  # noqa: PLC0415
    from camri_tune.metrics import Precision  # noqa: PLC0415
    from camri_tune.records import named  # noqa: PLC0415

    allow(model)
    figures = evaluate_bundle(bundle, data, data_dir=_data_dir(data_dir), skip_corrupt=skip_corrupt)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{figures['images']:,} images: {figures['data']}")
    print(f"accuracy {_share(figures['shares']['accuracy'])}")
    for c in figures["important"]:
        share = figures["shares"]["recall"][str(c)]
        print(f"recall of {named(c, figures['classes'])}: {'no such images' if share is None else _share(share)}")
        precision = figures["shares"]["precision"][str(c)]
        print(f"precision of {named(c, figures['classes'])}: {Precision(precision['right'], precision['answers'])}")
    if (found := figures["calibration"]) is not None:
        before = found["before"]
        print(
            f"probabilities at temperature {found['temperature']:.4g} (at 1): expected calibration error "
            f"{found['decided']['expected_calibration_error']:.4f} "
            f"({before['decided']['expected_calibration_error']:.4f}), negative log-likelihood "
            f"{found['negative_log_likelihood']:.4f} ({before['negative_log_likelihood']:.4f})"
        )
    else:
        print("the model has no temperature (or no finite logits): its numbers are scores, not probabilities")
    if (same := figures["matches_stored"]) is not None:
        print(f"the stored test figures are {'reproduced exactly' if same else 'other than these'}")


def _share(share: Mapping[str, Any]) -> str:
    """A share with its interval, and what its images count as where that is less than their number."""
    low, high = share["interval"]
    text = f"{share['value']:.4f} [{low:.4f}, {high:.4f}] ({'exact ' if share['exact'] else ''}95 % interval"
    if share["exact"]:
        return f"{text})"
    hidden = share["hidden_groups"]
    groups = f" of about {share['n'] / hidden['size']:,.0f} unnamed tracks" if hidden else " in groups"
    return f"{text}; {share['n']:,} images{groups}, which count as {share['effective_n']:,.0f})"


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="An exported model, such as runs/NAME/best.")],
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders that are looked through; .npz files of embeddings.")
    ],
    form: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How the answers are printed.")
    ] = "table",
    model: OwnModelOption = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Leave unreadable images out.")] = False,
) -> None:
    """What an exported model decides for images of any number, and how surely; it says if its numbers are scores."""
    from camri_tune.answers import meaning  # noqa: PLC0415
    from camri_tune.bundle import read_bundle  # noqa: PLC0415
    from camri_tune.predict import Predictions, lines_of  # noqa: PLC0415

    allow(model)
    predictions = Predictions(read_bundle(bundle), images, on_corrupt=_warn if skip_corrupt else None)
    for line in lines_of(predictions, form):
        print(line)
    if predictions.left_out:
        _warn(f"{predictions.left_out:,} corrupt image file(s) were left out (--skip-corrupt)")
    if predictions.passed_over:
        _warn(f"{predictions.passed_over:,} file(s) that are no images were passed over")
    _warn(meaning(predictions.config.spec))


@app.command()
def export(
    what: Annotated[
        str | None, typer.Argument(help="A study's name, its folder, or a bundle's (default: the last study).")
    ] = None,
    form: Annotated[
        Literal["bundle", "onnx", "torchscript", "torch-export"],
        typer.Option("--format", help="bundle: the study's best/ again, or a copy. onnx needs camri-tune[onnx]."),
    ] = "bundle",
    to: Annotated[
        Path | None, typer.Option(help="File, or a bundle's folder, to write (default: beside the bundle).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to compare both models on, as for evaluate (default: the study's test).")
    ] = None,
    data_dir: DataDirOption = None,
    model: OwnModelOption = None,
    out: OutOption = Path("runs"),
    storage: StorageOption = None,
) -> None:
    """Write an exported model in another format, compared with the original on real images, or its bundle again."""
    from camri_tune.export import export as export_model  # noqa: PLC0415

    allow(model)
    done = export_model(what, form, to=to, data=data, out=out, storage=storage, data_dir=_data_dir(data_dir))
    print(done.path)
    if done.parity is not None:
        print(f"compared with the PyTorch model on {done.parity}")


@app.command()
def figures(
    which: Annotated[str, typer.Option(help="2 (the losses over a plane), 3 (MNIST in a plane), or both.")] = "2,3",
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Folder for figure2.html, figure3.html and figure3.json.")] = Path(
        "figures"
    ),
    margin: Annotated[float, typer.Option(help="Margin of the important class, in radians.")] = 0.4,
    scale: Annotated[float, typer.Option(help="Scale of figure 3's cosine losses.")] = 16.0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each of figure 3's three networks.")] = 4,
    limit: Annotated[int | None, typer.Option(min=10, help="Train them on at most N images.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Base of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """The paper's Figures 2 and 3, from the real losses and from networks trained on MNIST."""
    from camri_tune.figures import write_figures  # noqa: PLC0415

    for path in write_figures(
        which.split(","),
        out=out,
        data_dir=_data_dir(data_dir),
        margin=margin,
        scale=scale,
        epochs=epochs,
        limit=limit,
        seed=seed,
        device=device,
        say=lambda text: print(text, file=sys.stderr),
    ):
        print(path)


@app.command()
def datasets() -> None:
    """What can be trained on."""
    print("digits    1,797 handwritten digits, 8x8, 10 classes; comes with scikit-learn, no download")
    print(
        "cifar10   60,000 photographs, 32x32, 10 classes; from DATA_DIR/cifar10 or torchvision's files, or downloaded"
    )
    print("mnist     70,000 handwritten digits, 28x28, 10 classes; from DATA_DIR/MNIST/raw, else downloaded")
    print("awa2      37,322 photographs of 50 animals, resized to 64x64; from DATA_DIR/awa2, else downloaded (13 GB)")
    print("gtsrb     51,839 traffic signs at 32x32, 43 classes; 39,209 from DATA_DIR/gtsrb/GTSRB/Training/CLASS/*.ppm,")
    print("          else downloaded: torchvision's archive, which has 26,640 training images in the place of 39,209")
    print("PATH      a folder: PATH/train/CLASS/*, optional PATH/val and PATH/test; or PATH/CLASS/*, split by us")
    print(
        "PATH.csv  a list: columns path,label and perhaps group,split (train, validation, test); paths from its folder"
    )
    print("PATH.npz  arrays: images (uint8), labels and perhaps groups, split, classes; or train_images, val_images, …")
    print("          or embeddings (N, D) of any network in the place of images, with --model head")
    print(
        r"          --group-by '(?P<group>patient\d+)_' names what files show, so that it stays on one side of a split"
    )


@app.command()
def doctor() -> None:
    """What this machine offers: devices, precision, versions, storage."""
    import torch  # noqa: PLC0415

    from camri_tune.database import STORAGE_VARIABLE, masked  # noqa: PLC0415
    from camri_tune.evaluation import versions  # noqa: PLC0415
    from camri_tune.training import has_fast_bfloat16  # noqa: PLC0415

    libraries = {name: _version(name, f"camri-tune[{name}]") for name in ("torchvision", "timm")}
    for name, version in {**versions(), **libraries}.items():
        print(f"{name:12} {version}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        label = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{device!s:12} {label}, trains in {'bfloat16' if has_fast_bfloat16(device) else 'float32'}")
    url = os.environ.get(STORAGE_VARIABLE)
    print(f"{'storage':12} {masked(url) if url else f'SQLite {sqlite3.sqlite_version}, a file in each folder'}")
    for kind, install in (("postgresql", "psycopg[binary]"), ("grpc", "grpcio"), ("s3", "boto3")):
        package = install.partition("[")[0]
        print(f"{kind:12} {package} {_version(package, install)}")


def _version(package: str, install: str) -> str:
    """Of a library that may be missing, or what to install."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install '{install}')"


def main() -> NoReturn:
    """Entry point. Errors made on purpose are one line; an interrupt says how to resume."""
    keep_freed_memory()  # a model is judged in three quarters of the time
    atexit.register(gc.freeze)  # or the interpreter collects, at its end, all that PyTorch is made of: a second or two
    _mend_streams()
    try:
        _require_text()
        with heard(signal.SIGINT, signal.SIGTERM):
            code = app(standalone_mode=False)
        sys.stdout.flush()  # a full disk is told of here
    except typer.TyperException as error:
        _fail(_usage(error), error.exit_code)
    except CamriTuneError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk that is full, a folder that has gone: all that was finished is stored
        where = f" ({error.filename})" if error.filename else ""
        resumes = ", which resumes" if RESUMING.intersection(sys.argv[1:2]) else ""
        _fail(f"{error.strerror or error}{where}: mend that and give the same command again{resumes}", 1)
    if code == INTERRUPTED_EXIT_CODE:  # Typer, too, turns an interrupt into this code
        resumes = "; the same command resumes" if RESUMING.intersection(sys.argv[1:2]) else ""
        _fail(f"interrupted{resumes}", INTERRUPTED_EXIT_CODE)
    sys.exit(code if isinstance(code, int) else 0)


def _mend_streams() -> None:
    """A stream that was closed is one that nobody reads; what its encoding lacks is written as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_text() -> None:
    """Bytes that are no text can be in no name, path or URL: neither a database nor a page could hold them."""
    try:
        texts = [("current folder", os.getcwd())]
    except OSError:  # PyTorch would end the process, and say something else
        raise InputError("the current folder is gone; change to one that is there") from None
    texts += [("argument", text) for text in sys.argv[1:]]
    texts += [(f"${name}", os.environ.get(name, "")) for name in ("CAMRI_STORAGE", "CAMRI_DATA", "CAMRI_CACHE")]
    for what, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            value = shown(re.sub("//.*@", "//***@", text))
            raise InputError(f"{what} {value} has bytes that are not UTF-8; give it in UTF-8, or rename it") from None


def _usage(error: typer.TyperException) -> str:
    """What Typer says of an argument, and the value, which it leaves out."""
    message, cause = error.format_message(), error.__cause__
    if not isinstance(cause, ValidationError):
        return f"{message} A database's URL is given as --storage." if names_a_database(message) else message
    value, message = shown(cause.errors()[0]["input"]), message.replace("Value error, ", "").rstrip(".")
    return message if value in message else f"{message}, which {value} is not"


def _config(context: typer.Context, study: Path | None, options: Mapping[str, Any]) -> StudyConfig:
    """What the options say, where they are silent the study file, and then the environment."""
    given = {key: value for key, value in options.items() if value is not None}
    values: dict[str, Any] = {}
    source = context.get_parameter_source("storage")
    if source is not None and source.name == "ENVIRONMENT":
        given.pop("storage")  # what a study file says goes before it
    if study is not None:
        if names_a_database(str(study)):
            raise InputError("the URL of a database is no study file: give it as --storage")
        values = read_study_file(study)
        StudyConfig.build(values, source=f"study file {str(study)!r}")  # an error names the file it stands in
    return StudyConfig.build({**values, **given}).in_this_environment()


def _data_dir(given: Path | None) -> Path:
    """`--data-dir`, else $CAMRI_DATA, else ./data."""
    if given is not None:
        return StudyConfig.build({"data_dir": given}).data_dir
    return StudyConfig(storage=None).in_this_environment().data_dir


def _show(result: "Result", as_json: bool) -> None:
    from camri_tune.claims import provenance  # noqa: PLC0415
    from camri_tune.records import without_nan  # noqa: PLC0415
    from camri_tune.tables import result_table  # noqa: PLC0415

    if as_json:
        print(json.dumps(without_nan(result.as_json()), indent=2))
    console = _result_console(as_json)
    console.print(result_table(result))
    console.print(result.sentence, soft_wrap=True)
    for line in (*result.notices, *provenance(result)):
        console.print(line, soft_wrap=True)
    where = f"{result.folder}/best" if result.best else f"nothing; {result.folder}/result.json has the figures"
    console.print(f"Exported: {where}", soft_wrap=True)
    console.print(f"Report: {result.folder}/report.html", soft_wrap=True)


def _show_comparison(table: "Table", as_json: bool) -> None:
    from camri_tune.records import without_nan  # noqa: PLC0415
    from camri_tune.table1 import legend  # noqa: PLC0415
    from camri_tune.tables import comparison_tables  # noqa: PLC0415

    if as_json:
        print(json.dumps(without_nan(table.as_json()), indent=2))
    console = _result_console(as_json)
    for part in comparison_tables(table):
        console.print(part)
    console.print(legend(table), soft_wrap=True)
    console.print(f"Files: {table.folder}/{table.stem}.*", soft_wrap=True)


def _result_console(as_json: bool) -> "RichConsole":
    from rich.console import Console as RichConsole  # noqa: PLC0415

    # Where standard output is not a terminal, its width is nobody's: let no figure be broken in two.
    return RichConsole(stderr=as_json, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def _fail(message: str, code: int) -> NoReturn:
    print(f"camri-tune: {printable(_without_passwords(' '.join(message.split())), 4000)}", file=sys.stderr)
    sys.exit(code)


def _without_passwords(message: str) -> str:
    """A message whose URLs have none, in their login or their query: they may be given where no URL is expected."""
    # A URL that was taken for a path has one slash left; a user's name may hold @ and /. What ends a sentence, or
    # quotes, is not the query's.
    message = re.sub(r"(\w:/{1,2}(?:[^\s/:][^\s:]*)?):\S*@", r"\1:***@", message)
    query = re.compile(r"([?&][\w.-]+=)[^\s&]+?(?=['\"),;]*(?:[\s&]|$))")
    return re.sub(r"\w:/\S+", lambda url: query.sub(r"\1...", url[0]), message)


def _warn(message: object) -> None:
    """Say something that is no result, on standard error."""
    print(f"camri-tune: {printable(str(message), 4000)}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""An exported model in another format, compared with the PyTorch model before it is written; or its bundle again.

The other formats hold all that `Answering` does: uint8 images in (or embeddings), normalisation inside, and the class,
logits and probabilities out. What has to happen to an image before, and what the file is, stands in a JSON file beside.
"""

import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from camri_tune.answers import Answering, meaning, output_names
from camri_tune.bundle import CONFIG, WEIGHTS, Bundle, BundleConfig, ModelSpec, read_bundle, read_card, write_bundle
from camri_tune.config import is_data_file, printable, shown, why_no_path
from camri_tune.errors import BundleError, CamriTuneError, DataError, InputError
from camri_tune.evaluation import images_for, versions
from camri_tune.evidence import Evidence
from camri_tune.files import sha256
from camri_tune.overview import EVIDENCE, RESULT, find_study, read_overview
from camri_tune.sources import is_data_dir_of
from camri_tune.storage import EXPORTED, StudyStore

Format = Literal["bundle", "onnx", "torchscript", "torch-export"]
Run = Callable[[Tensor], tuple[Tensor, ...]]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}
MOST_COMPARED = 1_000  # images
BATCH, SINGLES = 64, 8  # images at once, and how many are also compared one by one
NOISE = 1e-3  # of logits, for each unit of the largest: two ways to add up float32 differ by a hundredth of that
MOST_NOTE = 2**22  # bytes of the JSON beside a model; 1,000 classes take 300,000
WRITER = "camri-tune"
RESIZE = (
    "the whole image, EXIF rotation applied, transparency shown on white, as 8-bit RGB, squeezed without cropping to a "
    "square of this side: Pillow's Image.resize((side, side), Image.Resampling.BILINEAR), which is bilinear with "
    "antialiasing; then, for one channel, Pillow's convert('L'). An image of this size stays as it is"
)


@dataclass(frozen=True)
class Parity:
    """How far the written model's answers lie from the PyTorch model's, on so many `images`; `real` or made up.

    Differences are the largest of any image and class. `differing` counts images that the class decided for differs of,
    `largest_gap` is how far apart the PyTorch model's own logits of two such classes lie: of a tie, hardly at all.
    """

    images: int
    data: str
    real: bool
    runtime: str
    batch_sizes: tuple[int, ...]
    max_difference_of_logits: float
    max_difference_of_probabilities: float
    differing: int
    largest_gap: float
    largest_logit: float

    @property
    def is_noise(self) -> bool:
        """Whether no difference is larger than two ways to round one sum make it."""
        most = NOISE * max(1.0, self.largest_logit)
        return (
            math.isfinite(self.largest_logit)
            and self.max_difference_of_logits <= most
            and self.largest_gap <= 2 * most
            and self.max_difference_of_probabilities <= NOISE
        )

    def __str__(self) -> str:
        return (
            f"{self.images:,} {'' if self.real else 'made-up '}images ({self.data}), in {self.runtime}: largest "
            f"difference of logits {self.max_difference_of_logits:.3g} (the largest is {self.largest_logit:.3g}), "
            f"of probabilities {self.max_difference_of_probabilities:.3g}; {self.differing} predictions differ"
        )


@dataclass(frozen=True)
class Exported:
    """The file or folder that holds the model, and how it compared; None for a bundle, which is the model itself."""

    path: Path
    parity: Parity | None


def export(
    what: str | None,
    form: Format,
    *,
    to: Path | None,
    data: str | None,
    out: Path,
    storage: str | None,
    data_dir: Path,
) -> Exported:
    """Write a study's exported model, or that of a bundle's folder, in a format. Nothing half-written gets its name.

    Without `to` it goes beside the bundle, and a study's bundle to its own place. Only a file that this wrote is
    replaced. Raises InputError; CamriTuneError where the written model would answer otherwise than the PyTorch model.
    """
    if form == "bundle" and data is not None:
        raise InputError("--data is for --format onnx, torchscript and torch-export, which are compared; leave it out")
    if to is not None and (reason := why_no_path(str(to))):
        raise InputError(f"--to is {shown(str(to))}, where nothing can be: {reason}; name another place")
    if to is not None and not to.name:
        raise InputError(f"--to is {shown(str(to))}, which names no file; name one")
    if form == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    folder, store = _find(what, out, storage)
    if form == "bundle":
        return Exported(_bundle_again(folder, store, to), None)
    bundle = read_bundle(folder)
    path = folder.resolve().with_name(f"{folder.resolve().name}{SUFFIXES[form]}") if to is None else to
    _require_ours(path)
    pixels, text, real = _images(bundle, folder, data, data_dir)
    answering = Answering(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        partial = scratch / path.name
        try:
            with _silence():
                runtime, run = _WRITERS[form](answering, partial, output_names(bundle.config.spec))
                parity = _compare(answering, run, pixels, text, real, runtime)
        except (CamriTuneError, OSError):
            raise
        except Exception as error:  # whatever an exporter or a runtime may raise of an operator that it lacks
            lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise CamriTuneError(
                f"this network cannot be written as {form} ({printable(lines[-1])}); try another --format"
            ) from None
        if not parity.is_noise:
            raise CamriTuneError(f"the model as {form} answers otherwise, so nothing was written: {parity}")
        note = {**_description(bundle, form), "file": path.name, "sha256": sha256(partial), "parity": asdict(parity)}
        partial.chmod(0o644)
        # The note first: of the two it alone says that a file is ours, and may be replaced.
        (scratch / "note").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch / "note", _note_of(path))
        os.replace(partial, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(path, parity)


def withdraw(folder: Path, spec: ModelSpec | None, weights_sha256: str | None) -> None:
    """Rename what `export` wrote beside the `best/` of a study's folder where that is another model now, or none."""
    same = None if spec is None else (weights_sha256, *_decision(spec))
    for suffix in SUFFIXES.values():
        path = folder / f"best{suffix}"
        note = _read_note(_note_of(path))
        if note is None or same == tuple(note.get(key) for key in ("weights_sha256", "temperature", "logit_bias")):
            continue
        for each in (path, _note_of(path)):
            if os.path.lexists(each):
                each.rename(folder / f"withdrawn-{int(time.time())}-{each.name}")


def _decision(spec: ModelSpec) -> tuple[float | None, dict[str, float]]:
    """What a model's answers depend on beside its weights, as its note has it."""
    return spec.temperature, {str(c): value for c, value in spec.logit_bias.items()}


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: pip install 'camri-tune[onnx]'")


def _find(what: str | None, out: Path, storage: str | None) -> tuple[Path, StudyStore | None]:
    """The folder of the bundle, which need not be there where a study is named, and that study."""
    if what is not None and (os.path.isfile(os.path.join(what, CONFIG)) or os.path.isfile(os.path.join(what, WEIGHTS))):
        return Path(what), None
    store = find_study(what, out=out, storage=storage)
    folder = store.config.folder / "best"
    return folder, store


def _bundle_again(folder: Path, store: StudyStore | None, to: Path | None) -> Path:
    """Copy a bundle that is whole; where there is none, write a study's from the checkpoint that is stored."""
    place = folder if to is None else to
    if store is None and to is None:
        raise InputError(f"{str(folder)!r} is a bundle as it is; name a place for a copy with --to")
    try:
        bundle = read_bundle(folder)
    except BundleError:
        if store is None:
            raise
        _from_checkpoint(store, place)
        return place
    if place.resolve() == folder.resolve():
        return place
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / WEIGHTS
        shutil.copyfile(folder / WEIGHTS, weights)
        if sha256(weights) != bundle.config.weights_sha256:  # between two readings
            raise BundleError(f"{str(folder / WEIGHTS)!r} was altered just now; export the model again")
        write_bundle(place, weights=weights, config=bundle.config, metrics=bundle.metrics, card=read_card(folder))
    return place


def _from_checkpoint(store: StudyStore, place: Path) -> None:
    """Write the bundle that a study exported, as it was, from what its storage and its result hold."""
    again = "give its run's command again, which trains what is missing and exports"
    overview = read_overview(store)
    if overview.result is None:
        raise InputError(f"study {store.name!r} has no {RESULT} yet, so nothing to export; {again}")
    if overview.result["best"] is None:
        raise InputError(f"study {store.name!r} ended without a model: {overview.result['sentence']}")
    kept: Any = store.attributes.get(EXPORTED)
    try:
        config = BundleConfig.model_validate(kept["config"])
        metrics, card = dict(kept["metrics"]), str(kept["card"])
        record = next(r for r in store.records("finalists") if r.number == kept["trial"] and r.sha256 == kept["sha256"])
        known = metrics["sentence"] == overview.result["sentence"]
    except (KeyError, TypeError, ValueError, ValidationError, StopIteration):  # of an earlier version, or altered
        known = False
    if not known:
        raise InputError(
            f"study {store.name!r} does not say what of it was exported, or not as its result has it; {again}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / WEIGHTS
        if not store.fetch_checkpoint(record, weights):
            raise InputError(
                f"the checkpoint of study {store.name!r} is missing or altered under {store.artifacts_url}"
            )
        write_bundle(place, weights=weights, config=config, metrics={**metrics, "study": overview.result}, card=card)


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _require_ours(path: Path) -> None:
    """Raise InputError where a file is in the way that this did not write."""
    note, what = _note_of(path), None
    if os.path.lexists(note):
        what = _read_note(note)
        if what is None:
            raise InputError(
                f"{str(note)!r} is in the way, and was not written by {WRITER}; name another place with --to"
            )
    if os.path.lexists(path) and (what is None or not path.is_file() or sha256(path) != what.get("sha256")):
        raise InputError(
            f"{str(path)!r} is in the way, and is not as {WRITER} wrote it; move it, or name another file with --to"
        )


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > MOST_NOTE:
            return None
        note = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and note.get("written_by") == WRITER else None


def _images(bundle: Bundle, folder: Path, data: str | None, data_dir: Path) -> tuple[Tensor, str, bool]:
    """Images (N, C, S, S), or embeddings (N, D), to compare on, what they are, and whether they are real.

    Those of `data`; else the test part of the study's data, where that is here; else the test images that its report
    shows, where they are as large as the model takes them; else noise.
    """
    spec = bundle.config.spec
    if data is not None or _is_here(bundle.config.dataset, data_dir):
        try:
            unseen = images_for(bundle, data, data_dir=data_dir)
        except DataError:
            if data is not None:
                raise
        else:
            rows = torch.linspace(0, len(unseen.images) - 1, min(len(unseen.images), MOST_COMPARED)).long()
            found = unseen.images[rows.numpy()].pixels
            return found.flatten(1) if spec.are_embeddings else found, unseen.text, True
    evidence = Evidence.load(folder.resolve().parent / EVIDENCE, len(spec.classes))
    if evidence is not None and len(evidence.pixels) and evidence.pixels.shape[1:] == _shape(spec):
        return torch.from_numpy(evidence.pixels), "test images that the study's report shows", True
    same_each_time = torch.Generator().manual_seed(0)
    if spec.are_embeddings:
        made_up = torch.randn((BATCH, *_shape(spec)), generator=same_each_time)
    else:
        made_up = torch.randint(0, 256, (BATCH, *_shape(spec)), dtype=torch.uint8, generator=same_each_time)
    return made_up, "noise, for the study's test images are not here; name real ones with --data", False


def _is_here(dataset: str, data_dir: Path) -> bool:
    """Whether a data set can be opened without a download."""
    own = os.path.isdir(dataset) or (is_data_file(dataset) and os.path.isfile(dataset))
    return dataset == "digits" or own or is_data_dir_of(dataset, data_dir)


def _shape(spec: ModelSpec) -> tuple[int, ...]:
    """Of what the model takes one of."""
    return (spec.channels,) if spec.are_embeddings else (spec.channels, spec.image_size, spec.image_size)


@torch.inference_mode()
def _compare(answering: Answering, run: Run, pixels: Tensor, text: str, real: bool, runtime: str) -> Parity:
    """Ask both about all images, many at once, and about the first of them one by one."""
    batches = [*torch.split(pixels, BATCH), *torch.split(pixels[:SINGLES], 1)]
    logits, numbers, gaps, largest, differing = [0.0], [0.0], [0.0], [0.0], 0
    for place, some in enumerate(batches):
        (decided, ours, probabilities), (theirs_decided, theirs, their_probabilities) = answering(some), run(some)
        logits.append(_largest(ours - theirs))
        numbers.append(_largest(probabilities - their_probabilities))
        two = torch.stack([decided, theirs_decided], dim=1)
        gaps.append(_largest(ours.gather(1, two).diff(dim=1)))
        largest.append(_largest(ours))
        if place < len(batches) - min(SINGLES, len(pixels)):
            differing += int((decided != theirs_decided).sum())
    return Parity(
        images=len(pixels),
        data=text,
        real=real,
        runtime=runtime,
        batch_sizes=tuple(sorted({len(some) for some in batches})),
        max_difference_of_logits=max(logits),
        max_difference_of_probabilities=max(numbers),
        differing=differing,
        largest_gap=max(gaps),
        largest_logit=max(largest),
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().nan_to_num(nan=math.inf).max())  # a NaN is less than nothing


@contextmanager
def _silence() -> Iterator[None]:
    """What PyTorch says of its own formats (that one is deprecated, that a constant is one) is nothing to a user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _input_name(spec: ModelSpec) -> str:
    return "embeddings" if spec.are_embeddings else "images"


def _example(answering: Answering) -> tuple[Tensor, ...]:
    spec = answering.spec
    return (torch.zeros((2, *_shape(spec)), dtype=torch.float32 if spec.are_embeddings else torch.uint8),)


def _write_onnx(answering: Answering, path: Path, outputs: list[str]) -> tuple[str, Run]:
    import onnxruntime  # noqa: PLC0415 - belongs to an extra

    name = _input_name(answering.spec)
    program = torch.onnx.export(
        _with_fixed_windows(answering),
        _example(answering),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[name],
        output_names=outputs,
        verbose=False,
    )
    assert program is not None, "the new exporter gives a program"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where on this machine the code of its lines lies
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(outputs, {name: pixels.numpy()})))

    return f"onnxruntime {onnxruntime.__version__} (opset {program.model.opset_imports['']})", run


def _write_torchscript(answering: Answering, path: Path, outputs: list[str]) -> tuple[str, Run]:
    with torch.no_grad():
        # What its own check would find, the comparison finds.
        traced = torch.jit.trace(answering, _example(answering), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(path))
    return f"TorchScript of torch {torch.__version__}", torch.jit.load(str(path))  # type: ignore[no-untyped-call]


def _write_torch_export(answering: Answering, path: Path, outputs: list[str]) -> tuple[str, Run]:
    program = torch.export.export(
        answering, _example(answering), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    torch.export.save(program, path)
    return f"torch.export of torch {torch.__version__}", torch.export.load(path).module()


_WRITERS: dict[Format, Callable[[Answering, Path, list[str]], tuple[str, Run]]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "torch-export": _write_torch_export,
}


class _FixedMaxPool(nn.Module):
    """`AdaptiveMaxPool2d` to `size` x `size` as slices and maxima, which ONNX has, for it lacks windows that differ."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        for dim in (2, 3):
            n = maps.shape[dim]
            windows = [(i * n // self.size, -(-(i + 1) * n // self.size)) for i in range(self.size)]
            parts = [maps.narrow(dim, low, high - low).amax(dim, keepdim=True) for low, high in windows]
            maps = torch.cat(parts, dim)
        return maps


def _with_fixed_windows(module: Answering) -> Answering:
    """A copy whose adaptive pools are as ONNX can hold them."""
    copy = deepcopy(module)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveMaxPool2d) and isinstance(child.output_size, int):
                setattr(parent, name, _FixedMaxPool(child.output_size))
    return copy


def _description(bundle: Bundle, form: Format) -> dict[str, Any]:
    """What somebody needs who has but the file: what goes in, what comes out, and which model it is."""
    config, spec = bundle.config, bundle.config.spec
    decided, logits, numbers = output_names(spec)
    temperature, bias = _decision(spec)
    taken: dict[str, Any] = {"name": _input_name(spec), "shape": ["batch", *_shape(spec)]}
    if spec.are_embeddings:
        taken |= {"type": "float32", "what": config.input}
    else:
        taken |= {
            "type": "uint8",
            "layout": "NCHW",
            "channels": {1: "grey", 3: "RGB"}.get(spec.channels, str(spec.channels)),
            "range": [0, 255],
            "resize": RESIZE,
            "normalisation": "inside the model: give it the bytes as they are",
        }
    return {
        "schema": 1,
        "written_by": WRITER,
        "format": form,
        "classes": list(spec.classes),
        "important": list(config.important),
        "input": taken,
        "outputs": {
            decided: "int64 (batch): index of the class decided for, the argmax of the logits",
            logits: f"float32 (batch, {len(spec.classes)}), with the bias of the decision, if any",
            numbers: f"float32 (batch, {len(spec.classes)}): {meaning(spec)}",
        },
        "temperature": temperature,
        "logit_bias": bias,
        "weights_sha256": config.weights_sha256,
        "dataset": config.dataset,
        "dataset_fingerprint": config.dataset_fingerprint,
        "versions": versions(),
    }

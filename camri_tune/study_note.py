"""What Optuna's dashboard shows of a study beside its trials: a note and two figures, stored with the study."""

import hashlib
import math
import re
from datetime import datetime

from camri_tune.charts import recall_accuracy, search_history
from camri_tune.overview import Overview
from camri_tune.progress import STAGE_TITLES, done, duration, total
from camri_tune.records import value_text
from camri_tune.storage import StudyStore

PUBLISHED = "camri_tune:published"  # what the note and figures in the storage were made of


def publish(overview: Overview, store: StudyStore) -> list[str]:
    """Keep the study's note and figures in the dashboard up to date; return which of them were written.

    What is made of the same as what is stored is left alone.
    """
    from optuna_dashboard import save_note, save_plotly_graph_object  # noqa: PLC0415

    study = store.optuna_study("search")
    stored = store.storage.get_study_system_attrs(study._study_id).get(PUBLISHED, {})
    note, figures = _note(overview), (("recall-accuracy", recall_accuracy), ("search-history", search_history))
    made = {"note": _digest(note)}
    if made["note"] != stored.get("note"):
        # The time alone is no news.
        now = datetime.now().astimezone()
        save_note(study, f"{note}\n\n*As of {now:%Y-%m-%d %H:%M} ({now:%Z}).*\n")
    for name, draw in figures:
        figure = draw(overview)
        made[name] = _digest(figure.to_json())
        if made[name] != stored.get(name):
            save_plotly_graph_object(study, figure, graph_object_id=name)
    written = [name for name, digest in made.items() if digest != stored.get(name)]
    if written:
        store.storage.set_study_system_attr(study._study_id, PUBLISHED, made)
    return written


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _note(overview: Overview) -> str:
    """What the study is about and how it stands, in Markdown."""
    config = overview.config
    important = f"**{_plain(overview.important_names)}**"
    if not overview.important:
        important += " (as asked for; the baseline's recall will say which class that is)"
    parts = [
        f"## {_plain(overview.name)}",
        f"Tuned on `{overview.dataset}`: recall of {important} with loss `{config.loss}`, "
        f"over {_names(overview)}, while accuracy is kept.",
        f"**Floor.** {_floor(overview)}",
        f"**How far.** {_how_far(overview)}",
    ]
    if overview.result is not None and overview.finished:
        parts.append(f"**Result.** {_plain(str(overview.result['sentence']))}")
    else:
        parts.append(f"**Best trial so far.** {_best(overview)}")
    if not overview.is_comparison and overview.within is None:  # nothing is exported, and no command opens a part
        parts += [
            f"**Export.** {_export(overview)}",
            f"Look at this study with `camri-tune dashboard {overview.name}`: a plain `optuna-dashboard` 0.21 does not "
            "read the constraint, and draws trials that miss the floor as feasible.",
        ]
    return "\n\n".join(parts)


def _names(overview: Overview) -> str:
    names = sorted({name for record in overview.search for name in record.params})
    return ", ".join(f"`{name}`" for name in names) or "the learning rate and the loss's own parameters"


def _floor(overview: Overview) -> str:
    if overview.floor is None:
        return "The cross-entropy baseline is still training; its validation accuracy sets the floor."
    baseline = overview.baseline
    text = f"A trial is feasible with a validation accuracy of at least {overview.floor:.2%}"
    more = "".join(f" As well: {_plain(constraint.in_words(overview.classes))}." for constraint in overview.constraints)
    if baseline is None:
        return f"{text}.{more}"
    return (
        f"{text}: the cross-entropy baseline's less {overview.config.tolerance:g} points. The baseline's recall is "
        f"{baseline.measured(overview.important).recall.mean:.2%} (validation, mean of {len(baseline.records)} seeds)."
        f"{more}"
    )


def _how_far(overview: Overview) -> str:
    if overview.stage == "judged":
        return "The run is through."
    if overview.within is not None:
        stage = overview.stage
        ended = sum(r.ended for r in overview.records[stage])
        return (
            f"{STAGE_TITLES[stage]}: {ended} of {len(overview.records[stage])} queued so far done. The note of "
            f"`{overview.within}` says how far the whole comparison is."
        )
    if overview.schedule is None:
        return "Nothing is trained yet."
    stage, schedule, records = overview.stage, overview.schedule, overview.everything
    finished, planned = done(records[stage], stage, schedule), total(records, stage, schedule)
    text = f"{STAGE_TITLES[stage]}: {math.floor(finished)} of {planned} done."
    if not overview.running:
        return f"{text} No run works on it now."
    left = overview.seconds_left
    if left is None:
        return f"{text} The time to go is not known yet."
    return f"{text} About {duration(left)} to go in all." if left >= 1 else f"{text} Then comes the judgement."


def _best(overview: Overview) -> str:
    best = overview.best
    if best is None:
        return f"None has met {'every constraint' if overview.constraints else 'the floor'} yet."
    params = ", ".join(f"`{name}` {value_text(value, 4)}" for name, value in sorted(best.params.items()))
    return (
        f"Trial **{best.number}**: recall {best.recall or 0.0:.2%}, accuracy {best.accuracy or 0.0:.2%}, {params}. "
        "It is a candidate on validation, not a result: the best of many trials is partly lucky, and finalists are "
        "trained again on fresh seeds."
    )


def _export(overview: Overview) -> str:
    meanwhile = "A trial's own model is its artifact `model.safetensors`."
    if overview.result is None or not overview.finished:
        return f"The run itself writes `{overview.name}/best` when it has judged finalists on test. {meanwhile}"
    if overview.result.get("best") is None:
        return f"No model came out, so nothing is exported. {meanwhile}"
    return f"`{overview.name}/best` is a model with the parameters of trial {overview.result['best']['trial']}."


def _plain(text: str) -> str:
    """Names of classes and studies mean themselves, not Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", text)

"""What people read afterwards: the model card of an exported bundle."""

from camri_tune.records import Figure, Result


def model_card(result: Result) -> str:
    """Markdown for the bundle's README: what the model is for, what was measured on which data, what is not claimed."""
    best = result.best
    assert best is not None, "only an exported model has a card"
    accuracy, recall = best.accuracy_difference, best.recall_difference
    shares = "\n".join(
        f"| recall of {c} ({result.classes[c]}), test | {share.value:.4f} | {share.right} of {share.n} | "
        f"[{share.interval.low:.4f}, {share.interval.high:.4f}] |"
        for c, share in best.exported_recall.items()
    )
    params = ", ".join(f"{name} = {value:.4g}" for name, value in sorted(best.params.items()))
    return f"""# {result.study}

Image classifier of {len(result.classes)} classes ({result.dataset}), trained so that class {result.important_names} is
missed less often, while accuracy stays at the cross-entropy baseline's. Written by camri-tune {result.versions["camri-tune"]}.

**{result.sentence}**

## This model (one seed, {best.exported_seed})
| figure | value | right | exact 95 % interval |
|---|---|---|---|
{shares}
| accuracy, test | {best.exported_accuracy.value:.4f} | {best.exported_accuracy.right} of {best.exported_accuracy.n} | [{best.exported_accuracy.interval.low:.4f}, {best.exported_accuracy.interval.high:.4f}] |

Against the baseline model of the same seed, on the same test images: accuracy {100 * accuracy.estimate:+.2f} points (95 % lower
bound {100 * accuracy.lower_bound:+.2f}; {accuracy.gained} images gained, {accuracy.lost} lost, of {accuracy.n}); recall {100 * recall.estimate:+.2f} points (lower bound
{100 * recall.lower_bound:+.2f}; {recall.gained} gained, {recall.lost} lost, of {recall.n}).

## Over {result.seeds} seeds
| mean ± sd | baseline (cross-entropy) | this setting ({result.loss}: {params}) |
|---|---|---|
| recall, test | {_text(result.baseline.test.recall)} | {_text(best.side.test.recall)} |
| accuracy, test | {_text(result.baseline.test.accuracy)} | {_text(best.side.test.accuracy)} |
| recall, validation | {_text(result.baseline.validation.recall)} | {_text(best.side.validation.recall)} |
| accuracy, validation | {_text(result.baseline.validation.accuracy)} | {_text(best.side.validation.accuracy)} |

## How it was judged
- Trained on {result.images["train"]:,} images; {result.images["validation"]:,} validation images chose the baseline's learning rate, the
  trial ({best.trial}), the setting and the seed. {result.images["test"]:,} test images chose nothing.
- {result.trials["complete"]} trials complete, {result.trials["pruned"]} pruned, {result.trials["failed"]} failed; tolerance {result.tolerance:g} points of validation accuracy;
  margin of the certificate {result.epsilon:g} points at 95 % one-sided (Tango's score bound).
- Not claimed: anything about images from elsewhere than the test set's, or about retraining with another seed or more data.
- The logits have no margin; their softmax is not a calibrated probability.

Use: `camri-tune evaluate FOLDER`. Weights: safetensors, no code.
"""


def _text(figure: Figure) -> str:
    return f"{figure.mean:.4f}" if figure.sd is None else f"{figure.mean:.4f} ± {figure.sd:.4f}"

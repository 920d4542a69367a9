"""What an exported model answers: the class it decides for, its logits, and probabilities, or scores that are none."""

import torch
from torch import Tensor, nn

from camri_tune.bundle import Bundle, ModelSpec
from camri_tune.records import named


class Answering(nn.Module):
    """A bundle's model with all that follows its logits. This is what other formats hold.

    uint8 images (N, C, S, S), or embeddings (N, D) -> the class decided for (N,) int64, logits (N, classes), of which
    it is the argmax, and probabilities (N, classes): the softmax over the bundle's temperature, without the bias of a
    decision (see ModelSpec).
    """

    bias: Tensor

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        spec = bundle.config.spec
        self.classifier = bundle.classifier
        self.spec = spec
        self.temperature = spec.temperature or 1.0
        bias = torch.zeros(len(spec.classes))
        for c, value in spec.logit_bias.items():
            bias[c] = value
        self.register_buffer("bias", bias)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = self.classifier.head.get_logits(self.classifier.embed(images))
        logits = plain + self.bias
        return logits.argmax(dim=1), logits, torch.softmax(plain / self.temperature, dim=1)


def number_name(spec: ModelSpec) -> str:
    """What the numbers of a model may be called."""
    return "score" if spec.temperature is None else "probability"


def output_names(spec: ModelSpec) -> list[str]:
    """Names of what `Answering` gives, in its order."""
    return ["class_index", "logits", "scores" if spec.temperature is None else "probabilities"]


def meaning(spec: ModelSpec) -> str:
    """One sentence: what the numbers are, and how a class is decided with a bias."""
    if spec.temperature is None:
        text = "scores are a softmax of the logits, for which no temperature was fitted: they are no probabilities"
    else:
        text = f"probabilities are a softmax of the logits over a temperature of {spec.temperature:.4g}, which was "
        text += "fitted on validation (the model card says how well they hold on test)"
    biases = {c: value for c, value in spec.logit_bias.items() if value != 0}
    if not biases:
        return text
    added = ", ".join(f"{value:+.4g} to the logit of {named(c, spec.classes)}" for c, value in biases.items())
    return f"{text}; the class is decided after adding {added}, which they leave out: it need not be the likeliest"

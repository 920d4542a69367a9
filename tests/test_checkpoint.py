"""A training that goes on from a saved state ends with the very weights of one that was never interrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from camri_tune.checkpoint import TrainingState
from camri_tune.config import BUILT_IN_MODELS, HEAD, Model, StudyConfig
from camri_tune.datasets import open_dataset
from camri_tune.training import HeadSpec, Progress, Trained, recipe_of, train


@pytest.mark.parametrize("model", [*sorted({*BUILT_IN_MODELS} - {HEAD}), "torchvision:mobilenet_v3_small"])
def test_a_resumed_training_ends_with_the_same_weights(model: Model, tmp_path: Path) -> None:
    """Dropout, batch norm's statistics, the optimizer's moments and the order of the images all go on."""
    data = open_dataset(StudyConfig())
    states: list[TrainingState] = []
    few = data.train[np.arange(200)]

    def trained(resume: TrainingState | None = None) -> Trained:
        recipe = recipe_of(model, epochs=3, learning_rate=4e-3, augmentation=data.augmentation, images=len(few))

        def keep(progress: Progress) -> None:
            states.append(progress.state)

        head = HeadSpec("camri", margins={3: 0.2})
        cpu = torch.device("cpu")
        return train(
            model, head, few, few, num_classes=10, recipe=recipe, seed=1, device=cpu, on_epoch=keep, resume=resume
        )

    whole = trained().classifier.state_dict()
    states[0].save(tmp_path / "state", {"epochs": 1})
    found = TrainingState.load(tmp_path / "state")
    assert found is not None
    state, note = found
    assert note == {"epochs": 1}
    assert state.epoch == 1
    for _ in range(2):  # an attempt that fails leaves the state as it was
        resumed = trained(state).classifier.state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(states[0].weights["head.weight"], whole["head.weight"])


def test_a_file_that_holds_no_state_is_none(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert TrainingState.load(tmp_path / "state") is None
    assert TrainingState.load(tmp_path / "nowhere") is None

"""What outputs mean: scores and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from castling_deploy.errors import UsageError
from castling_deploy.task import Classification, task_named


def test_top1_counts_the_labelled_images_only() -> None:
    logits = np.eye(3, dtype=np.float32)
    assert Classification().score({"logits": logits}, np.array([0, 2])) == 50
    assert Classification().score({"logits": logits}, None) is None


def test_probabilities_follow_from_logits_and_nothing_else_does() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [0.0, np.log(3.0), -np.inf]])
    derived = Classification().derived({"logits": logits}, (32, 32))
    assert derived.keys() == {"probabilities"}
    np.testing.assert_allclose(derived["probabilities"].expected, [[0.5, 0.5, 0], [0.25, 0.75, 0]])


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        task_named("clasification")
    assert "'classification'" in (caught.value.hint or "")

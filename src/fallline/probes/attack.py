"""Membership attacks: what they are shown of a model, what they answer, and scores of classifiers by cross-fitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..noise import rng

Floats = NDArray[np.float64]

SKETCH = 3
"""Dimensions of a parameter's gradient that an attack sees; source: Pandora's White-Box, layerwise features."""

FOLDS = 5
"""Parts of the examples in cross-fitting, hence the fewest members, and non-members, to audit with."""


@dataclass(frozen=True)
class Seen:
    """What a model shows of N examples. An attack finds what it `reads`; the rest may be empty.

    Attributes:
        loss: [N], mean negative log-likelihood of an example's labels, nats.
        base_loss: [N], the same under the model as it was before training.
        squared: trained parameter → [N], the squared norm of the gradient of `loss`.
        sketch: trained parameter → [N, 3], that gradient projected at random, alike for all examples.
    """

    loss: Floats
    base_loss: Floats = field(default_factory=lambda: np.empty(0))
    squared: Mapping[str, Floats] = field(default_factory=dict)
    sketch: Mapping[str, Floats] = field(default_factory=dict)


class Attack(Protocol):
    """Says of each example how much it looks like one the model was trained on.

    Attributes:
        reads: fields of `Seen`.
    """

    reads: ClassVar[frozenset[str]]

    def score(self, seen: Seen, member: NDArray[np.bool_]) -> Floats:
        """Higher: rather a member. What is learned from `member` [N] never scores an example it has seen.

        Returns:
            [N].
        """
        ...


def cross_fitted(classifier: Callable[[], Any], rows: Any, member: NDArray[np.bool_]) -> Floats:
    """Log-odds of membership, each from a classifier that was fitted without that example.

    The examples are cut into five parts with as many members and non-members each as can be, the same at every call.
    An interval of such scores is somewhat too narrow: it takes the five classifiers as given.

    Args:
        classifier: makes a new one, as scikit-learn's are.
        rows: [N] or [N, features], an array. member: [N], at least five of each.

    Returns:
        [N].
    """
    part = np.empty(len(member), np.int64)
    generator = rng(0, 0, "audit/folds")
    for side in (True, False):
        where = np.flatnonzero(member == side)
        part[where[torch.randperm(len(where), generator=generator).numpy()]] = np.arange(len(where)) % FOLDS
    scores = np.empty(len(member))
    for k in range(FOLDS):
        fitted = classifier().fit(rows[part != k], member[part != k])
        scores[part == k] = fitted.decision_function(rows[part == k])
    return scores


def of_numbers() -> Any:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def of_texts() -> Any:
    """Logistic regression on which words and marks a text has, in column 0, and on standardised numbers in the rest."""
    from sklearn.compose import make_column_transformer
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    words = CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]")
    features = make_column_transformer((words, 0), (StandardScaler(), slice(1, None)))
    return make_pipeline(features, LogisticRegression(max_iter=1000))


def blind(texts: Sequence[str], lengths: NDArray[np.int64], member: NDArray[np.bool_]) -> Floats:
    """How members and non-members can be told apart by their words and lengths alone, without any model.

    Where this succeeds, the two differ in more than in having been trained on, and no attack shows memory alone.

    Args:
        texts: N, not all blank. lengths: [N, 2], tokens and labels of each. member: [N], at least five of each.

    Returns:
        [N], higher: rather a member.
    """
    rows = np.empty((len(texts), 3), dtype=object)
    rows[:, 0], rows[:, 1:] = texts, np.log(lengths)
    return cross_fitted(of_texts, rows, member)

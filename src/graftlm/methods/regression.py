"""Regressions on features, of labels and of numbers, of a strength that cross-validation chooses: heads, baselines."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from threadpoolctl import threadpool_limits

__all__ = ["fit_logistic", "fit_ridge"]


def fit_logistic(
    features: Any,
    labels: Sequence[int],
    *,
    strengths: Sequence[float],
    scaled: bool,
    intercept: bool = True,
    iterations: int = 500,
    judged_by: str | None = None,
) -> Any:
    """The fitted pipeline of scikit-learn for `features` [rows, width]: a scaler where `scaled`, then the regression.

    `strengths` are the inverse penalties C to choose among, by `judged_by` (None: accuracy), in up to four folds; where
    a label has one row alone, C is 1. Without `intercept` features are scaled and not centred.

    Example:
        >>> import numpy as np
        >>> found = fit_logistic(np.array([[0.0], [0.1], [1.0], [1.1]]), [0, 0, 1, 1], strengths=(1.0,), scaled=True)
        >>> found.predict([[0.05], [1.2]]).tolist()
        [0, 1]
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [StandardScaler(with_mean=intercept)] if scaled else []
    model = make_pipeline(*steps, LogisticRegression(max_iter=iterations, fit_intercept=intercept))
    folds = min(4, min(Counter(labels).values()))
    # One thread: the problem is small, and threads that wait for one another on a busy machine cost minutes.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit cut at its last iteration is as good a start, and a fair baseline
        if folds < 2:
            return model.fit(features, labels)
        search = GridSearchCV(model, {"logisticregression__C": list(strengths)}, cv=folds, scoring=judged_by)
        return search.fit(features, labels).best_estimator_


def fit_ridge(features: Any, values: Sequence[float], *, intercept: bool = True) -> Any:
    """The fitted pipeline of scikit-learn for `features` [rows, width]: a scaler, then ridge regression.

    The penalty is chosen by cross-validation, leaving one row out each time.

    Example:
        >>> import numpy as np
        >>> fit_ridge(np.array([[0.0], [1.0], [2.0], [3.0]]), [0.0, 2.0, 4.0, 6.0]).predict([[5.0]]).round(1).tolist()
        [10.0]
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strengths = (1e-3, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
    model = make_pipeline(StandardScaler(with_mean=intercept), RidgeCV(alphas=strengths, fit_intercept=intercept))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(features, values)

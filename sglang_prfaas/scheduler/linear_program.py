"""A small linear program: maximise the sum of x, with A x <= b and x >= 0. Dense simplex; for tens of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_EPSILON = 1e-10
_STEEPEST_STEPS = 2000


def maximise_sum(a: Floats, b: Floats) -> Floats:
    """The x of the largest sum. `a` is [M, N], `b` [M] and not negative, so x = 0 is a start. Returns [N].

    Rows are scaled first. The steepest column enters; after many steps Bland's rule, which cannot cycle. Raises
    ValueError for a negative b and for a sum without limit.
    """
    if (b < 0).any():
        raise ValueError(f"b must not be negative, got {b.min()}")
    rows, columns = a.shape
    scale = np.maximum(np.abs(a).max(axis=1, initial=0.0), _EPSILON)
    table = np.zeros((rows + 1, columns + rows + 1))
    table[:rows, :columns] = a / scale[:, None]
    table[:rows, columns : columns + rows] = np.eye(rows)
    table[:rows, -1] = b / scale
    table[rows, :columns] = -1.0
    basis = np.arange(columns, columns + rows)
    steps = 0
    while True:
        costs = table[rows, :-1]
        entering = int(np.argmin(costs)) if steps < _STEEPEST_STEPS else int(np.argmax(costs < -_EPSILON))
        if costs[entering] >= -_EPSILON:
            break
        column = table[:rows, entering]
        ratios = np.where(column > _EPSILON, table[:rows, -1] / np.where(column > _EPSILON, column, 1.0), np.inf)
        lowest = ratios.min()
        if not np.isfinite(lowest):
            raise ValueError(f"the sum has no limit: column {entering} is bounded by no row")
        tied = np.flatnonzero(ratios <= lowest + _EPSILON)
        leaving = int(tied[np.argmin(basis[tied])])
        table[leaving] /= table[leaving, entering]
        factors = table[:, entering].copy()
        factors[leaving] = 0.0
        table -= np.outer(factors, table[leaving])
        basis[leaving] = entering
        steps += 1
    x = np.zeros(columns + rows)
    x[basis] = table[:rows, -1]
    return x[:columns]

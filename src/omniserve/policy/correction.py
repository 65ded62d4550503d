"""Keeping a fitted latency model right while it is used: a robust filter, and what it still gets wrong.

`Correction` follows the machine, `ErrorWindow` remembers errors of predictions made before each update.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence

# Parts of a walk that are corrected each on its own, then what a busy host adds to all of them, then what the
# moment does to all of them.
PARTS = ("dense", "attention", "head", "other")
_BUSY, _MOMENT = len(PARTS), len(PARTS) + 1
_SIZE = len(PARTS) + 2

# Standard deviations, relative to the fit. At the start: of a factor common to all parts, of each part's own,
# of a busy host's. Per walk: how far they wander.
_START_COMMON, _START_OWN, _START_BUSY = 0.2, 0.12, 0.15
_WANDER_COMMON, _WANDER_OWN, _WANDER_BUSY = 0.005, 0.002, 0.004
# The moment (a neighbour, a clock): how far it goes in a walk, in deviations of an error, and how much stays.
_MOMENT_SPREAD, _MOMENT_STAYS = 1.0, 0.8
_NOISE_AT_START = 0.03
_LEAST_NOISE = 0.005
_NOISE_STEP = 0.05  # the running median of errors moves by so much of itself
_MEDIAN_TO_DEVIATION = 1.4826
# An error of more deviations counts as just so many; three in a row on one side are no outliers.
_OUTLIER, _NO_OUTLIER = 3.0, 3
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 50.0


def _covariance(common: float, own: float, busy: float) -> list[list[float]]:
    parts = len(PARTS)
    matrix = [[common**2] * parts + [0.0, 0.0] for _ in range(parts)] + [[0.0] * _SIZE for _ in range(2)]
    for i in range(parts):
        matrix[i][i] += own**2
    matrix[_BUSY][_BUSY] = busy**2
    return matrix


class Correction:
    """Factors on the parts of a prediction, followed by a Kalman filter over random walks.

    Measured / fitted = sum_i (f_i + b * share) * part_i / fitted + g + noise, with f_i near 1 and b near 0;
    share is the host's busy share, g the moment, which passes by itself. Against least squares with
    forgetting: what the present load does not excite (prefill attention while only decodes run) keeps its
    uncertainty bounded instead of growing without end, and a machine that slows down as a whole moves all
    parts at once, those not seen too. One error of many deviations (the process lost its core) counts as a
    small one, and g does not follow it; three in a row mean another machine, and the filter starts anew from
    there.
    """

    def __init__(self) -> None:
        self.factors = [1.0] * len(PARTS) + [0.0, 0.0]
        self._start = _covariance(_START_COMMON, _START_OWN, _START_BUSY)
        self._wander = _covariance(_WANDER_COMMON, _WANDER_OWN, _WANDER_BUSY)
        self._covariance = [row[:] for row in self._start]
        self._median_error = _NOISE_AT_START / _MEDIAN_TO_DEVIATION
        self._outliers = 0  # in a row; below zero: on the low side

    def apply(self, parts: Sequence[float], share: float) -> float:
        """Corrected seconds of fitted parts (in the order of PARTS)."""
        dense, attention, head, other, busy, moment = self.factors
        busy = busy * share + moment
        return (
            max(_LEAST_FACTOR, dense + busy) * parts[0]
            + max(_LEAST_FACTOR, attention + busy) * parts[1]
            + max(_LEAST_FACTOR, head + busy) * parts[2]
            + max(_LEAST_FACTOR, other + busy) * parts[3]
        )

    def observe(self, parts: Sequence[float], share: float, seconds: float) -> None:
        """Take in a measured time of these fitted parts."""
        fitted = sum(parts)
        weights = [part / fitted for part in parts] + [share, 1.0]
        error = seconds / fitted - sum(f * w for f, w in zip(self.factors, weights, strict=True))
        gain, variance = self._gain(weights)
        limit, kept = _OUTLIER * math.sqrt(variance), None
        if abs(error) <= limit:
            self._outliers = 0
        else:
            side = 1 if error > 0 else -1
            self._outliers = side * (abs(self._outliers) + 1 if self._outliers * side > 0 else 1)
            if abs(self._outliers) < _NO_OUTLIER:
                error = side * limit
                kept = self.factors[_MOMENT], self._covariance[_MOMENT][_MOMENT]
            else:
                self._outliers = 0
                error += self.factors[_MOMENT]  # it was one of the machine before
                self.factors[_MOMENT] = 0.0
                self._covariance = [row[:] for row in self._start]
                gain, variance = self._gain(weights)
        self._note(abs(error))
        self._update(gain, variance, error)
        if kept is not None:  # what an outlier met is over already: it tells nothing about the moment
            self.factors[_MOMENT], self._covariance[_MOMENT][_MOMENT] = kept
        self._go_on()

    def _go_on(self) -> None:
        """To the next walk: all wanders, and the moment passes."""
        for row, wander in zip(self._covariance, self._wander, strict=True):
            for j, more in enumerate(wander):
                row[j] += more
        self._bound()
        self.factors[_MOMENT] *= _MOMENT_STAYS
        for row in self._covariance:
            row[_MOMENT] *= _MOMENT_STAYS
        last = self._covariance[_MOMENT]
        last[:] = [_MOMENT_STAYS * c for c in last]
        last[_MOMENT] += (_MOMENT_SPREAD * self._noise) ** 2

    def _gain(self, weights: Sequence[float]) -> tuple[list[float], float]:
        """Covariance times weights, and the variance of an error."""
        gain = [sum(c * w for c, w in zip(row, weights, strict=True)) for row in self._covariance]
        return gain, sum(g * w for g, w in zip(gain, weights, strict=True)) + self._noise**2

    @property
    def _noise(self) -> float:
        """Standard deviation of an error, relative to the fit."""
        return max(_LEAST_NOISE, _MEDIAN_TO_DEVIATION * self._median_error)

    def _update(self, gain: Sequence[float], variance: float, error: float) -> None:
        for i, g in enumerate(gain):
            low = _LEAST_FACTOR if i < len(PARTS) else _LEAST_FACTOR - 1  # of those that are added
            self.factors[i] = min(_MOST_FACTOR, max(low, self.factors[i] + g * error / variance))
            row = self._covariance[i]
            for j, other in enumerate(gain):
                row[j] -= g * other / variance

    def _bound(self) -> None:
        """No factor is less certain than at the start."""
        scale = [
            min(1.0, math.sqrt(self._start[i][i] / self._covariance[i][i]))
            if i != _MOMENT and self._covariance[i][i] > 0
            else 1.0
            for i in range(_SIZE)
        ]
        if min(scale) < 1.0:
            for i, row in enumerate(self._covariance):
                for j in range(_SIZE):
                    row[j] *= scale[i] * scale[j]

    def _note(self, error: float) -> None:
        """The running median of errors."""
        step = 1 + _NOISE_STEP if error > self._median_error else 1 / (1 + _NOISE_STEP)
        self._median_error = max(_LEAST_NOISE / _MEDIAN_TO_DEVIATION, self._median_error * step)


class ErrorWindow:
    """The last predictions of one kind and what was measured, and the errors of those that walks of this kind
    were planned by. Nothing is left out as an outlier."""

    def __init__(self, size: int, expected: Iterable[float] = ()) -> None:
        """expected: relative errors that are there from the start."""
        self._pairs: deque[tuple[float, float]] = deque(maxlen=size)
        self._errors: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size
        for error in expected:
            self.add_error(error)

    def note(self, predicted_s: float, measured_s: float) -> None:
        """For the accuracy, which is of predictions of what ran."""
        self._pairs.append((predicted_s, measured_s))

    def add_error(self, error: float) -> None:
        """A relative error that the margin has to cover."""
        if len(self._errors) == self._size:
            del self._sorted[bisect_left(self._sorted, self._errors.popleft())]
        self._errors.append(error)
        insort(self._sorted, error)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def margin(self, quantile: float) -> float:
        """Share of a prediction to add so that `quantile` of walks stay below; never negative.

        Of n errors that is the ceil((n + 1) quantile)-th smallest: were the next error drawn like those, it
        would stay below with at least this probability (split conformal prediction). With fewer errors than
        that takes, the largest.
        """
        count = len(self._sorted)
        if not count:
            return 0.0
        return max(0.0, self._sorted[min(count, math.ceil((count + 1) * quantile)) - 1])

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(predicted, measured) seconds, oldest first."""
        return list(self._pairs)


def accuracy(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of (predicted, measured) pairs: 1 - |error| / measured, its mean and what 90 % of them reach.

    The mean of none is 0 beside a count of 0.
    """
    values = sorted((1 - abs(p - m) / m for p, m in pairs), reverse=True)
    if not values:
        return {"count": 0, "mean": 0.0, "p90": 0.0}
    p90 = values[math.ceil(0.9 * len(values)) - 1]
    return {"count": len(values), "mean": sum(values) / len(values), "p90": p90}

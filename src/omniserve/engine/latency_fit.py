"""From measured walks to WalkCosts: non-negative robust least squares of relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import WalkCosts
from omniserve.policy.staircase import Staircase

Array = npt.NDArray[np.float64]

_FOLDS = 5
_REWEIGHTINGS = 8
# Errors beyond so many median errors count less (Huber), but not before they exceed `_LEAST_ERROR`.
_TYPICAL, _LEAST_ERROR = 2.0, 0.005
# The staircases' factors (dense, head) are near 1: an error of theirs counts as so many of a walk's. They are
# never less than a quarter: no walk is for nothing, whatever the noise.
_FACTOR_WEIGHTS = np.array([0.2, 0.1])
_LEAST_FACTOR = 0.25


@dataclass(frozen=True, slots=True)
class WalkSample:
    """A walk that ran."""

    load: WalkLoad
    seconds: float


def features(load: WalkLoad, dense: Staircase, head: Staircase, num_layers: int) -> list[float]:
    """What each coefficient of WalkCosts is multiplied with; the staircases as measured come first."""
    return [
        dense.at(load.num_tokens + load.lane_rows / num_layers),
        head.at(load.num_samples),
        1.0,
        float(load.num_decodes > 0),
        load.num_decodes,
        load.decode_context,
        load.num_chunks,
        load.prefill_load,
        load.chunk_context,
        float(load.lane_rows > 0),
        load.lane_rows,
        load.copied_tokens,
    ]


def fit_costs(
    samples: Sequence[WalkSample], dense: Staircase, head: Staircase, num_layers: int
) -> tuple[WalkCosts, list[float]]:
    """Costs of whole walks, and each sample's relative error under a fit that has not seen it.

    Staircases measured alone keep their shape; how they run inside a walk (other data in the caches, one more
    call between them) is a factor on each.
    """
    matrix = np.array([features(s.load, dense, head, num_layers) for s in samples], dtype=np.float64)
    seconds = np.array([s.seconds for s in samples])
    coefficients = _solve(matrix, seconds)
    fold = np.arange(len(samples)) % min(_FOLDS, len(samples))
    errors = np.zeros(len(samples))
    for i in range(fold.max() + 1 if len(samples) > 1 else 0):
        held_out = fold == i
        expected = matrix[held_out] @ _solve(matrix[~held_out], seconds[~held_out])
        errors[held_out] = seconds[held_out] / expected - 1
    return _costs(coefficients.tolist(), dense, head), errors.tolist()


def _costs(found: list[float], dense: Staircase, head: Staircase) -> WalkCosts:
    in_dense, in_head, overhead, decode, request, token, chunk, load, context, lanes, lane, copied = found
    return WalkCosts(
        dense=_scaled(dense, in_dense),
        head=_scaled(head, in_head),
        decode_token_s=token,
        decode_request_s=request,
        decode_s=decode,
        prefill_load_s=load,
        prefill_context_s=context,
        prefill_chunk_s=chunk,
        lane_row_s=lane,
        lane_walk_s=lanes,
        overhead_s=overhead,
        row_overhead_s=0.0,
        copy_token_s=copied,
    )


def _scaled(stairs: Staircase, factor: float) -> Staircase:
    return Staircase(stairs.rows, tuple(factor * seconds for seconds in stairs.seconds))


def _solve(matrix: Array, seconds: Array) -> Array:
    """Coefficients >= 0 of the smallest relative errors, large errors counting less."""
    factors = len(_FACTOR_WEIGHTS)
    least = np.zeros(matrix.shape[1])
    least[:factors] = _LEAST_FACTOR
    prior = np.zeros((factors, matrix.shape[1]))
    prior[:, :factors] = np.diag(_FACTOR_WEIGHTS)
    relative = np.vstack([matrix / seconds[:, None], prior])
    target = np.concatenate([np.ones(len(seconds)), _FACTOR_WEIGHTS]) - relative @ least
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    weights = np.ones(len(target))
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        found = _non_negative(relative / scale * root[:, None], target * root)
        errors = np.abs(relative / scale @ found - target)[: len(seconds)]
        typical = max(_LEAST_ERROR, _TYPICAL * float(np.median(errors)))
        weights[: len(seconds)] = np.minimum(1.0, typical / np.maximum(errors, 1e-12))
    solution: Array = least + found / scale
    return solution


def _non_negative(matrix: Array, target: Array) -> Array:
    """argmin |matrix x - target| over x >= 0: the active-set method of Lawson and Hanson."""
    x = np.zeros(matrix.shape[1])
    free = np.zeros(len(x), dtype=bool)
    for _ in range(3 * len(x)):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = 0.0
        if gradient.max() <= 1e-9:
            break
        free[gradient.argmax()] = True
        while True:
            wanted = np.zeros(len(x))
            wanted[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                x = wanted
                break
            step = float(np.min(x[below] / (x[below] - wanted[below])))
            x = x + step * (wanted - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return x

"""Seconds as a linear function of a few sizes, learnt as decoding goes. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

_RIDGE = 0.002  # weight of the guess beside the measurements: as much as sizes that vary by 4.5 % of their mean
_LARGEST_SURPRISE = 1.5  # a time is taken for at most so many times the expected: a pause of the machine is no cost
_NUM_TRUSTED = 2.0  # samples, before anything is a surprise


class LinearCost:
    """Least squares over samples that fade; no size makes anything faster.

    Sizes that have not varied, or only together, cannot be told apart: then half of the mean is in proportion to
    them, in equal shares.
    """

    def __init__(self, num_sizes: int, *, decay: float) -> None:
        """Each sample weighs `decay` of what the next one does."""
        self._decay = decay
        self._weight = self._seconds = 0.0
        self._sizes = [0.0] * num_sizes
        self._moments = [[0.0] * num_sizes for _ in range(num_sizes)]  # sums of products of two sizes
        self._products = [0.0] * num_sizes  # sums of a size times seconds
        self._slopes: list[float] | None = None

    def add(self, sizes: Sequence[float], seconds: float) -> None:
        """A sample: seconds at these sizes."""
        expected = self.at(sizes) if self._weight > _NUM_TRUSTED - 1 else 0.0
        if expected > 1e-6:
            seconds = min(seconds, _LARGEST_SURPRISE * expected)
        d = self._decay
        self._weight, self._seconds = d * self._weight + 1, d * self._seconds + seconds
        for i, size in enumerate(sizes):
            self._sizes[i] = d * self._sizes[i] + size
            self._products[i] = d * self._products[i] + size * seconds
            for j, other in enumerate(sizes):
                self._moments[i][j] = d * self._moments[i][j] + size * other
        self._slopes = None

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return self._weight > 0

    @property
    def mean(self) -> float:
        """Seconds, over the samples that there have been."""
        return self._seconds / self._weight if self._weight else 0.0

    @property
    def slopes(self) -> list[float]:
        """Seconds for one more of each size."""
        if self._slopes is None:
            self._slopes = self._fitted()
        return self._slopes

    def at(self, sizes: Sequence[float]) -> float:
        """Expected seconds; 0 where nothing is known."""
        if not self._weight:
            return 0.0
        means = (total / self._weight for total in self._sizes)
        moves = zip(self.slopes, sizes, means, strict=True)
        return max(self.mean + sum(slope * (size - mean) for slope, size, mean in moves), 0.0)

    def _fitted(self) -> list[float]:
        """The slopes; where one comes out negative it is 0, and the others are fitted again."""
        slopes = [0.0] * len(self._sizes)
        used = [i for i, total in enumerate(self._sizes) if total > 0]
        while used:
            found = dict(zip(used, self._solved(used), strict=True))
            wrong = min(found, key=lambda i: found[i])
            if found[wrong] >= 0:
                for i in used:
                    slopes[i] = found[i]
                break
            used.remove(wrong)
        return slopes

    def _solved(self, used: list[int]) -> list[float]:
        """Ridge regression on centred, relative sizes, towards the guess."""
        n, mean = self._weight, self.mean
        means = [self._sizes[i] / n for i in used]
        guess = mean / 2 / len(used)  # of a size's own relative slope
        rows = []
        for a, i in enumerate(used):
            row = [(self._moments[i][j] / n) / (means[a] * means[b]) - 1 for b, j in enumerate(used)]
            row[a] += _RIDGE
            rows.append([*row, (self._products[i] / n) / means[a] - mean + _RIDGE * guess])
        return [slope / size for slope, size in zip(_solve(rows), means, strict=True)]


def _solve(rows: list[list[float]]) -> list[float]:
    """Gaussian elimination of a positive definite system [n, n + 1], in place."""
    n = len(rows)
    for i in range(n):
        for below in range(i + 1, n):
            factor = rows[below][i] / rows[i][i]
            for column in range(i, n + 1):
                rows[below][column] -= factor * rows[i][column]
    for i in reversed(range(n)):
        rows[i][n] = (rows[i][n] - sum(rows[i][j] * rows[j][n] for j in range(i + 1, n))) / rows[i][i]
    return [row[n] for row in rows]

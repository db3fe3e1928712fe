"""Seconds as a linear function of a few sizes, learnt as decoding goes. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

_RIDGE = 0.002  # weight of the guess beside the measurements: as much as sizes that vary by 4.5 % of their mean
_RECENT = 0.8  # decay of what a sample is compared with, for the slopes
_FIT_EVERY = 8  # samples, where nobody asks for the slopes
_NUM_TRUSTED = 1.5  # weight of samples, before anything is a surprise


class _Means:
    """Of sizes and seconds; samples fade."""

    def __init__(self, num_sizes: int, decay: float) -> None:
        self._decay = decay
        self.weight = self.seconds = 0.0
        self.sizes = [0.0] * num_sizes

    def add(self, sizes: Sequence[float], seconds: float) -> None:
        self.weight = self._decay * self.weight + 1
        self.seconds += (seconds - self.seconds) / self.weight
        for i, size in enumerate(sizes):
            self.sizes[i] += (size - self.sizes[i]) / self.weight


class LinearCost:
    """Least squares over samples that fade; no size makes anything faster.

    Slopes come from how a sample differs from the few before it. A machine is now faster, now slower, for seconds, and
    texts are now easier, now harder: over longer times sizes and seconds go together, or apart, by chance. Sizes that
    have not varied, or only together, cannot be told apart: then half of the mean is in proportion to them, in equal
    shares.
    """

    def __init__(self, num_sizes: int, *, decay: float, ridge: float = _RIDGE, largest_surprise: float = 1.5) -> None:
        """Each sample weighs `decay` of what the next one does. A time is taken for at most largest_surprise times the
        expected, since a pause of the machine is no cost; unless it comes twice in a row."""
        self._decay, self._ridge, self._largest_surprise = decay, ridge, largest_surprise
        self._was_surprise = False
        self._means = _Means(num_sizes, decay)
        self._recent = _Means(num_sizes, _RECENT)
        self._weight = 0.0
        self._moments = [[0.0] * num_sizes for _ in range(num_sizes)]  # of differences: sums of products of two sizes'
        self._products = [0.0] * num_sizes  # and of a size's and the seconds'
        self._slopes = [0.0] * num_sizes
        self._num_unfitted = 0  # samples since

    def add(self, sizes: Sequence[float], seconds: float) -> None:
        """A sample: seconds at these sizes."""
        if self._num_unfitted >= min(self._weight, _FIT_EVERY):
            self._fit()
        limit = self._largest_surprise * self._expected(sizes)
        is_surprise = self._means.weight >= _NUM_TRUSTED and 1e-6 < limit < seconds
        if is_surprise and not self._was_surprise:
            seconds = limit
        self._was_surprise = is_surprise
        if self._recent.weight:
            self._compare(sizes, seconds)
        self._means.add(sizes, seconds)
        self._recent.add(sizes, seconds)
        self._num_unfitted += 1

    def fade(self, share: float) -> None:
        """Keeps that share of all samples' weight."""
        self._means.weight *= share
        self._weight *= share
        self._products = [share * product for product in self._products]
        self._moments = [[share * moment for moment in row] for row in self._moments]

    def _compare(self, sizes: Sequence[float], seconds: float) -> None:
        changes = [size - mean for size, mean in zip(sizes, self._recent.sizes, strict=True)]
        change_s = seconds - self._recent.seconds
        self._weight = self._decay * self._weight + 1
        for i, change in enumerate(changes):
            self._products[i] = self._decay * self._products[i] + change * change_s
            for j, other in enumerate(changes):
                self._moments[i][j] = self._decay * self._moments[i][j] + change * other

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return self._means.weight > 0

    @property
    def mean(self) -> float:
        """Seconds, over the samples that there have been."""
        return self._means.seconds

    @property
    def slopes(self) -> list[float]:
        """Seconds for one more of each size."""
        self._fit()
        return self._slopes

    def at(self, sizes: Sequence[float]) -> float:
        """Expected seconds; 0 where nothing is known."""
        self._fit()
        return self._expected(sizes)

    def _expected(self, sizes: Sequence[float]) -> float:
        """By the slopes as they were fitted last."""
        moves = zip(self._slopes, sizes, self._means.sizes, strict=True)
        return max(self.mean + sum(slope * (size - mean) for slope, size, mean in moves), 0.0)

    def _fit(self) -> None:
        if self._num_unfitted:
            self._slopes, self._num_unfitted = self._fitted(), 0

    def _fitted(self) -> list[float]:
        """The slopes; where one comes out negative it is 0, and the others are fitted again."""
        slopes = [0.0] * len(self._means.sizes)
        used = [i for i, mean in enumerate(self._means.sizes) if mean > 0]
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
        """Ridge regression on sizes relative to their means, towards the guess."""
        n = max(self._weight, 1.0)
        means = [self._means.sizes[i] for i in used]
        guess = self.mean / 2 / len(used)  # of a size's own relative slope
        rows = []
        for a, i in enumerate(used):
            row = [self._moments[i][j] / n / (means[a] * means[b]) for b, j in enumerate(used)]
            row[a] += self._ridge
            rows.append([*row, self._products[i] / n / means[a] + self._ridge * guess])
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

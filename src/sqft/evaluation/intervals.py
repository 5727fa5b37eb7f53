"""95 % intervals: of a share, and of a mean per token."""

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["ratio_interval", "student_t", "wilson_interval"]

Z = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Source: Wilson 1927; Brown, Cai, DasGupta 2001 recommend it over the normal one for any n.
    """
    share = correct / total
    centre = share + Z**2 / (2 * total)
    spread = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return max(0.0, (centre - spread) / (1 + Z**2 / total)), min(1.0, (centre + spread) / (1 + Z**2 / total))


def ratio_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """The mean per unit sum(sums) / sum(counts) over items that hold several units, and its 95 % interval.

    The items are what was drawn, not their units, so the variance is that of the linearised ratio,
    sum((s_i - r c_i)²) n / ((n - 1) (sum c)²), with Student's t at n - 1. One item has an infinite interval.
    """
    n, units = len(sums), sum(counts)
    ratio = math.fsum(sums) / units
    if n < 2:
        return ratio, -math.inf, math.inf
    squares = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    spread = student_t(n - 1) * math.sqrt(squares * n / (n - 1)) / units
    return ratio, ratio - spread, ratio + spread


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t: exact for 1 and 2 degrees, else Hill's expansion (error below 0.3 %).

    Source: Abramowitz and Stegun 26.7.5.
    """
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = Z, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, start=1))

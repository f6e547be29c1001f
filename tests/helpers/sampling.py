"""Tests of a sample: their odds of a false alarm, and the smallest error they would catch."""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, chisquare, ncx2

FALSE_ALARM = 1e-9
"""One seed in a billion would fail a correct sampler."""

POWER = 1 - 1e-6
"""How surely a sampler that is off by `smallest_detectable_tv` is caught."""


def p_value(outcomes, distribution):
    """Pearson's chi-squared p-value of integer outcomes; 0 if one of them is impossible."""
    distribution = np.asarray(distribution, dtype=float).ravel()
    counts = np.bincount(np.asarray(outcomes).ravel(), minlength=len(distribution))
    assert len(counts) == len(distribution), "an outcome outside the vocabulary"
    possible = distribution > 0
    if counts[~possible].any():
        return 0.0
    expected = counts.sum() * distribution[possible] / distribution.sum()
    assert expected.min() > 5, f"too few samples for chi-squared: expected {expected.min():.2g}"
    return float(chisquare(counts[possible], expected).pvalue)


def smallest_detectable_tv(num_samples, num_outcomes, *, false_alarm=FALSE_ALARM, power=POWER):
    """The total variation that fails the test with probability `power`, wherever it lies.

    Over distributions at total variation v the chi-squared divergence is at least 4 v^2, so the
    statistic's noncentrality is at least 4 n v^2.
    """
    freedom = num_outcomes - 1
    critical = chi2.isf(false_alarm, freedom)
    needed = brentq(lambda shift: ncx2.sf(critical, freedom, shift) - power, 1.0, 1e4)
    return float(np.sqrt(needed / (4 * num_samples)))

"""Whether noise has the scale that it should have, and no other."""

import numpy as np
from scipy import stats


def assert_of_scale(noise, scale, distribution="norm"):
    """It passes for that scale, and does not for others."""
    noise = np.ravel(noise)
    assert stats.kstest(noise / scale, distribution).pvalue > 1e-3
    for wrong in (0.8, 1.25):
        assert stats.kstest(noise / scale / wrong, distribution).pvalue < 1e-6

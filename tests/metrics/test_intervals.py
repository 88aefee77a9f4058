from __future__ import annotations

from math import gamma, nan, pi, sqrt

import numpy as np
import pytest

from megatron_gpc.metrics.intervals import T_975, interval


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30])
def test_quantiles_are_those_of_students_t(degrees):
    x = np.linspace(0, T_975[degrees - 1], 200_001)
    scale = gamma((degrees + 1) / 2) / (sqrt(degrees * pi) * gamma(degrees / 2))
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.1, 0.2, 0.3], "0.200 ± 0.248"), ([0.1, nan], "0.100"), ([nan], "-"), ([], "-")],
)
def test_an_interval_is_of_the_values_that_are_known(values, text):
    assert str(interval(values)) == text

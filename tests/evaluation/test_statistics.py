"""Corner cases of the intervals and tests."""
import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from medmcqa_lora.evaluation.statistics import bootstrap_intervals, holm, smallest_difference


def test_resamples_that_all_agree_give_an_interval_without_width():
    correct = np.ones(10, int)
    assert bootstrap_intervals(lambda i, axis=-1: correct[i].mean(axis), 10) == [[1.0, 1.0]]


def test_holm_of_no_of_one_and_of_large_p_values():
    assert holm([]) == []
    assert holm([0.4]) == [0.4]
    assert max(holm([0.9, 0.8])) == 1.0


@pytest.mark.parametrize(("n", "changed"), product((23, 80, 1000, 4183), (0.2, 0.5)))
def test_the_smallest_difference_solves_connors_formula(n, changed):
    difference = smallest_difference(n, changed)
    if math.isnan(difference):
        return
    a, b = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    pairs = ((a * math.sqrt(changed) + b * math.sqrt(changed - difference**2)) / difference) ** 2
    assert abs(pairs - n) < 1e-6 * max(1, n)


@pytest.mark.parametrize(("n", "changed"), [(16, 0.1), (1, 0.5), (80, 0.0)])
def test_too_few_changed_answers_show_no_difference(n, changed):
    assert math.isnan(smallest_difference(n, changed))

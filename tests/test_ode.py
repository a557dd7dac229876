"""Many samples integrated at once, each with steps of its own."""

import builtins
import math
import threading

import numpy as np
import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.ode import Unsolved, solve_each

RATES = np.array([0.1, -1.0, 3.0, 20.0])


class Decay:
    """y' = rate cos(time) y, for each sample with a rate of its own; keeps what was asked."""

    def __init__(self, rates=RATES):
        self.rates = rates
        self.asked = []

    def __call__(self, times, states, rows):
        assert times.shape == (len(rows),)
        self.asked.append(list(rows))
        return self.rates[rows, None] * np.cos(times)[:, None] * states

    def exact(self, states, time):
        return states * np.exp(self.rates * math.sin(time))[:, None]


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(size=(len(RATES), 3))


def test_solutions_are_as_exact_as_asked_for(states):
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-8):
        field = Decay()
        ends = solve_each(field, states, (0.0, 2.0), tolerance).states
        errors.append(np.abs(ends / field.exact(states, 2.0) - 1).max())
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 5
    assert errors[2] < 1e-6


def test_no_sample_changes_the_steps_of_another(states):
    together = solve_each(Decay(), states, (0.0, 2.0), 1e-4)
    assert len(set(together.evaluations.tolist())) > 1
    for row, rate in enumerate(RATES):
        alone = solve_each(Decay(np.array([rate])), states[row : row + 1], (0.0, 2.0), 1e-4)
        np.testing.assert_array_equal(alone.states[0], together.states[row])
        assert alone.evaluations[0] == together.evaluations[row]


def test_samples_are_evaluated_together(states):
    field = Decay()
    evaluations = solve_each(field, states, (0.0, 2.0), 1e-4).evaluations
    assert len(field.asked) == evaluations.max()
    for row in range(len(states)):
        assert sum(row in rows for rows in field.asked) == evaluations[row]
    assert field.asked[0] == [0, 1, 2, 3]
    assert all(rows == sorted(rows) for rows in field.asked)


def test_time_may_run_backwards_or_not_at_all(states):
    field = Decay()
    ends = solve_each(field, states, (0.0, 1.0), 1e-8).states
    back = solve_each(field, ends, (1.0, 0.0), 1e-8).states
    np.testing.assert_allclose(back, states, rtol=1e-6)
    still = solve_each(field, states, (1.0, 1.0), 1e-8)
    np.testing.assert_array_equal(still.states, states)


def test_no_samples_are_no_work():
    assert solve_each(Decay(), np.zeros((0, 3)), (0.0, 1.0), 1e-4).states.shape == (0, 3)


def test_what_goes_wrong_in_the_field_ends_all_threads(states):
    before = threading.active_count()

    def field(times, states, rows):
        if times.max() > 0.1:
            raise RuntimeError("no memory")
        return states

    with pytest.raises(RuntimeError, match="no memory"):
        solve_each(field, states, (0.0, 1.0), 1e-4)
    assert threading.active_count() == before


def test_a_sample_without_a_solution_is_named(states):
    def field(times, states, rows):
        rates = np.where(np.array(rows) == 2, 1.0, 0.0)
        return rates[:, None] * states**2  # grows beyond all bounds within a finite time

    with pytest.raises(Unsolved, match="step size") as caught:
        solve_each(field, np.ones_like(states), (0.0, 5.0), 1e-4)
    assert caught.value.sample == 2


def test_a_derivative_that_is_not_finite_ends_the_search(states):
    """Scipy's choice of the first step would not end."""
    with pytest.raises(Unsolved, match="not finite"):
        solve_each(lambda times, states, rows: states * math.nan, states, (0.0, 1.0), 1e-4)


def test_without_scipy_the_extra_is_named(states, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"improved-diffusion\[ode\]"):
        solve_each(Decay(), states, (0.0, 1.0), 1e-4)

"""Ordinary differential equations of many samples, each with steps of its own, in one batch.

An integrator that chooses its steps would choose them for a whole batch together, and a sample's
result would depend on its company. Here every sample has an integrator, :mod:`scipy.integrate`'s,
in a thread; what all of them ask for next is evaluated at once.

That holds to the bit if the derivative of a sample does not depend on what it is evaluated with. A
network rounds differently in another batch; where it is rough, steps that follow its errors make
of 1e-7 a difference as large as the tolerance. Who wants the same to the bit evaluates one at once.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError

# (time [n], state [n, K], which samples these are [n]) -> time derivative [n, K]
Field = Callable[[np.ndarray, np.ndarray, list[int]], np.ndarray]


@dataclass(frozen=True)
class Solution:
    """``states`` float64 [N, K] at the end; ``evaluations`` int64 [N] of the field, per sample."""

    states: np.ndarray
    evaluations: np.ndarray


class Unsolved(UserError):
    """The integrator of a sample gave up; ``sample`` is its number in the batch."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(reason)
        self.sample = sample


def solve_each(
    field: Field, states: np.ndarray, span: tuple[float, float], tolerance: float
) -> Solution:
    """Integrate each sample from one time to another, with steps that no other sample changes.

    :param field: the derivative of any of the samples at a time of its own each; called in this
        thread.
    :param states: float64 [N, K] at the beginning.
    :param span: the first time and the last.
    :param tolerance: of the error of each step, relative and absolute, as the root mean square
        over K.
    :raises ValueError: where scipy is not installed; :class:`Unsolved` if an integrator gives up.
    """
    integrator = _integrator()
    lockstep = _Lockstep(len(states))
    with ThreadPoolExecutor(max_workers=max(1, len(states))) as threads:
        try:
            runs = [
                threads.submit(lockstep.run, integrator, row, state, span, tolerance)
                for row, state in enumerate(states)
            ]
            lockstep.serve(field)
        finally:
            lockstep.release()  # before the pool waits for its threads
    return _collect(runs, states)


def _integrator() -> Callable[..., Any]:
    """Dormand and Prince's pair of order 5 with an error estimate of order 4."""
    try:
        from scipy.integrate import RK45
    except ImportError:
        raise UserError("this needs scipy: pip install 'improved-diffusion[ode]'") from None
    return RK45


def _collect(runs: list[Future[Any]], states: np.ndarray) -> Solution:
    ends, evaluations = np.empty_like(states), np.zeros(len(states), dtype=np.int64)
    for row, run in enumerate(runs):
        try:
            ends[row], evaluations[row] = run.result()
        except FloatingPointError as error:
            raise Unsolved(row, str(error)) from None
    return Solution(ends, evaluations)


class _Released(Exception):
    """The thread is to end: nobody will answer it."""


class _Lockstep:
    """Threads that ask for derivatives, and the one that answers them all at once."""

    def __init__(self, count: int) -> None:
        self.answers = [queue.SimpleQueue[np.ndarray | None]() for _ in range(count)]
        # (sample, its time and state), or (sample, None) when it has come to its end
        self.questions = queue.SimpleQueue[tuple[int, tuple[float, np.ndarray] | None]]()

    def run(
        self,
        integrator: Callable[..., Any],
        row: int,
        state: np.ndarray,
        span: tuple[float, float],
        tolerance: float,
    ) -> tuple[np.ndarray, int]:
        """The life of a thread: integrate one sample.

        :return: the state at the end, and the number of evaluations.
        :raises FloatingPointError: if the integrator gives up.
        """

        def derivative(time: float, state: np.ndarray) -> np.ndarray:
            self.questions.put((row, (time, state)))
            answer = self.answers[row].get()
            if answer is None:
                raise _Released
            if not np.isfinite(answer).all():  # scipy would try ever smaller steps, for good
                raise FloatingPointError("the derivative is not finite")
            return answer

        try:
            first, last = span
            solver = integrator(derivative, first, state, last, rtol=tolerance, atol=tolerance)
            while solver.status == "running":
                reason = solver.step()
                if solver.status == "failed":
                    raise FloatingPointError(reason)
            return solver.y, solver.nfev
        finally:
            self.questions.put((row, None))

    def serve(self, field: Field) -> None:
        """Answer until all threads have come to their ends."""
        running = len(self.answers)
        while running:
            heard = dict(self.questions.get() for _ in range(running))  # one word of each
            asking = sorted(row for row, question in heard.items() if question is not None)
            running = len(asking)
            if asking:
                times, states = zip(*(heard[row] for row in asking), strict=True)
                for row, answer in zip(
                    asking, field(np.array(times), np.stack(states), asking), strict=True
                ):
                    self.answers[row].put(answer)

    def release(self) -> None:
        """End the threads that still ask."""
        for answer in self.answers:
            answer.put(None)

"""The dial: a ratio for a latency, with a clock that the tests turn."""

import logging

import numpy as np
import pytest

from sparse_detr.dial import ROUNDS, Dial
from sparse_detr.keep_ratio import USUAL_RANGE

SHAPE = (1, 480, 640)
LOWEST, HIGHEST = USUAL_RANGE
FIRST = 1 + 3 * ROUNDS + ROUNDS  # passes before the first call of a size


class Machine:
    """A clock, and a detector that takes ``base + slope * ratio`` seconds per 480x640 pixels."""

    def __init__(self, base=0.05, slope=0.1, noise=0.0, seed=0):
        self.base, self.slope, self.noise = base, slope, noise
        self.now, self.ratios, self.taken = 0.0, [], []
        self.generator = np.random.default_rng(seed)

    def clock(self):
        return self.now

    def seconds(self, ratio, pixels=480 * 640):
        spread = self.generator.lognormal(0, self.noise) if self.noise else 1.0
        return (self.base + self.slope * ratio) * pixels / (480 * 640) * spread

    def call(self, turn, shape=SHAPE, before=0.0):
        """One call through the dial; its seconds, the measuring not included."""
        start = self.now
        self.now += before

        def run(ratio):
            took = self.seconds(ratio, np.prod(shape))
            self.now += took
            self.ratios.append(ratio)
            self.taken.append(took + before)
            return ratio

        return turn(shape, run, start)


def turned(machine, latency_ms, calls, ratios=USUAL_RANGE, **kwargs):
    turn = Dial(latency_ms, machine.clock, ratios=ratios)
    for _ in range(calls):
        machine.call(turn, **kwargs)
    return np.array(machine.taken[-calls:]) * 1e3


@pytest.mark.parametrize("target", [60, 90, 140])
def test_a_quiet_machine_takes_what_was_asked_for(target):
    machine = Machine()
    taken = turned(machine, target, 3)
    np.testing.assert_allclose(taken, target, rtol=0.002)
    assert len(machine.ratios) == FIRST + 3  # measured once
    assert machine.ratios[-1] == pytest.approx((target / 1e3 - 0.05) / 0.1, abs=0.002)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_95th_percentile_that_meets_the_target(seed):
    taken = turned(Machine(noise=0.08, seed=seed), 100, 300)
    assert np.percentile(taken, 95) == pytest.approx(100, rel=0.1)
    assert np.median(taken) < 95


@pytest.mark.parametrize("factor", [1.5, 0.75])
def test_a_machine_that_drifts_is_followed(factor):
    machine = Machine(noise=0.02)
    turn = Dial(100, machine.clock)
    for _ in range(50):
        machine.call(turn)
    before = machine.ratios[-1]
    machine.base, machine.slope = machine.base * factor, machine.slope * factor
    for _ in range(200):
        machine.call(turn)
    assert np.percentile(machine.taken[-100:], 95) * 1e3 == pytest.approx(100, rel=0.1)
    assert (machine.ratios[-1] < before) == (factor > 1)


def test_the_ratio_stays_while_the_target_is_met():
    machine = Machine(noise=0.01)
    turned(machine, 100, 300)
    assert len(set(machine.ratios[FIRST:])) == 1


def test_sizes_that_differ_little_share_a_line_and_others_have_their_own():
    machine = Machine()
    turn = Dial(100, machine.clock)
    for shape in (SHAPE, (1, 640, 480), (1, 480, 656), SHAPE):
        machine.call(turn, shape)
    assert len(turn.lines) == 1 and len(machine.ratios) == FIRST + 4
    machine.call(turn, (1, 320, 640))
    machine.call(turn, (2, 240, 640))  # as many pixels as the first, but a batch
    assert len(turn.lines) == 3
    assert len(machine.ratios) == 3 * FIRST + 6


def test_what_happened_before_counts():
    np.testing.assert_allclose(turned(Machine(), 100, 3, before=0.02), 100, rtol=0.002)


@pytest.mark.parametrize(("target", "nearest"), [(20, LOWEST), (500, HIGHEST)])
def test_a_target_out_of_reach_is_told_once_with_what_is_possible(target, nearest, caplog):
    caplog.set_level(logging.INFO, "sparse_detr.dial")
    machine = Machine()
    turned(machine, target, 60)
    assert set(machine.ratios[FIRST:]) == {nearest}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    text = record.getMessage()
    assert f"latency_ms={target} cannot be met" in text and "55 to 150 ms" in text
    assert (
        "1 image of 480x640" in text and "keep ratios 0.05 to 1" in text and f"keep_ratio={nearest:g}" in text
    )


@pytest.mark.parametrize(("target", "used"), [(20, 0.1234), (75, 0.25), (500, 0.4)])
def test_no_ratio_outside_of_the_range_is_measured_or_used(target, used, caplog):
    machine = Machine()
    turned(machine, target, 60, ratios=(0.1234, 0.4))
    assert min(machine.ratios) == 0.1234 and max(machine.ratios) == 0.4
    np.testing.assert_allclose(machine.ratios[FIRST:], used)
    assert target == 75 or "62.3 to 90 ms on this machine at keep ratios 0.1234 to 0.4" in caplog.text


def test_the_usual_range_is_measured_at_its_ends_and_at_30_percent():
    machine = Machine()
    turned(machine, 90, 1)
    assert set(machine.ratios[: 1 + 3 * ROUNDS]) == {0.05, 0.3, 1.0}


def test_what_was_measured_is_one_line(caplog):
    caplog.set_level(logging.INFO, "sparse_detr.dial")
    turned(Machine(), 90, 2)
    (record,) = caplog.records
    assert record.levelname == "INFO" and f"{FIRST - 1} measured); keep_ratio=0.4" in record.getMessage()


def test_a_machine_too_noisy_to_tell_ratios_apart_still_gets_one():
    machine = Machine(slope=0.0, noise=0.3)
    turned(machine, 60, 50)
    assert all(LOWEST <= ratio <= HIGHEST for ratio in machine.ratios)


def test_results_are_those_of_the_ratio_in_use():
    machine = Machine()
    turn = Dial(90, machine.clock)
    used = machine.call(turn)
    (line,) = turn.lines.values()
    assert used == machine.ratios[-1] == line.ratio

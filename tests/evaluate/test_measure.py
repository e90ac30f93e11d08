"""Sampling in turns: what is drawn, and how its time is taken."""

import types

import numpy as np
import pytest

from dollar_jax.evaluate import measure as module
from dollar_jax.evaluate.measure import BoundSampler, draw_in_turns, samplers
from dollar_jax.program import Program


class Machine:
    """A clock that drawing moves on, a hundredfold the first time, and slower while something else runs."""

    pipeline = types.SimpleNamespace(schedule=types.SimpleNamespace(given_frames=0))
    mesh, latent_shape = None, (1, 1, 1, 1)

    def __init__(self, slow=()):
        self.now, self.turns, self.slow, self.compiled, self.placed = 0.0, [], slow, 0, []

    def condition(self, prompts):
        self.now += 1
        return (np.array([len(prompt) for prompt in prompts]),)

    def decode(self, latent):
        self.now += 2
        return latent

    def row(self, name, cost):
        def draw(params, keys, text):
            first = name not in self.turns
            self.turns.append(name)
            busy = 10 if len(self.turns) in self.slow else 1
            self.now += cost * (100 if first else busy)
            assert isinstance(params, str)
            return (text + float(params))[:, None, None, None, None].astype(np.float32)

        draw.program = lambda count: Program(f"{name}_{count}", self.compile)
        return BoundSampler(draw, 0.5, 1)

    def compile(self):
        self.compiled += 1
        return 0


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(slow=(3, 4))
    monkeypatch.setattr(module.time, "perf_counter", lambda: machine.now)

    def put(params, where):
        machine.placed.append(params)
        return str(params)

    where = types.SimpleNamespace(shard=lambda mesh, params: None, put=put)
    monkeypatch.setattr(module, "sharding", where)
    return machine


def test_rows_take_turns(machine):
    rows = {"teacher": machine.row("teacher", 40.0), "student": machine.row("student", 4.0)}
    frames, seconds = draw_in_turns(machine, rows, ["a", "bb", "ccc"], batch=2, seed=0, rounds=2)
    assert machine.placed == [0.5]  # once, of the rows that share them
    assert machine.compiled == 2 and machine.turns == ["teacher", "student"] * 4  # 2 batches twice
    assert seconds["student"]["diffusion"] == [200, 20, 2, 2]  # per video; others were busy in the second batch
    assert seconds["teacher"]["diffusion"] == [2000, 200, 20, 20]
    assert seconds["student"]["total"] == [201.5, 21.5, 3.5, 3.5]
    for found in frames.values():
        np.testing.assert_array_equal(found.ravel(), [1.5, 2.5, 3.5])  # each prompt once, in order


def test_the_speedup_is_of_medians_over_at_least_three(machine, monkeypatch):
    """So that a slow first turn does not count."""
    machine.slow = ()
    monkeypatch.setattr(module, "quality", lambda *_: {})
    rows = {"teacher_50": machine.row("teacher_50", 40.0), "student_4": machine.row("student_4", 4.0)}
    plan = module.SamplePlan(["a", "bb"], [], 1, 2, 0)  # type: ignore[arg-type]
    metrics, _ = module.measure(machine, rows, plan, None)
    assert len(machine.turns) == 2 * module.TIMED
    assert module.speedups(metrics, "teacher_50") == {"speedup_4": 10}


@pytest.mark.parametrize(
    ("timesteps", "students"),
    [((), []), ((1000.0,), [1]), ((1000.0, 700.0, 400.0), [3, 2, 1]), ((1000.0, 900.0, 750.0, 500.0), [4, 2, 1])],
    ids=len,
)
def test_a_student_is_measured_in_all_its_steps_and_in_fewer(toy_generator, timesteps, students):
    rows = samplers(toy_generator, toy_generator.pipeline.params, timesteps)
    found = [name for name in rows if not name.startswith("teacher")]
    undistilled = dict.fromkeys(n for n in (len(timesteps), 4, 1) if 0 < n <= len(timesteps))
    assert found == [f"student_{n}" for n in students] + [f"undistilled_{n}" for n in undistilled]
    assert [rows[name].nfe for name in found] == [*students, *undistilled]

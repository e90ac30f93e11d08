"""Where a chart's parts lie."""

import numpy as np
import pytest

from dollar_jax.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, dot_chart, line_chart


def points(line):
    return np.array([[float(n) for n in pair.split(",")] for pair in line.split()])


def test_a_line_runs_from_corner_to_corner_with_six_percent_to_spare():
    chart = line_chart(np.array([0.0, 50.0, 100.0]), np.array([0.0, 1.0, 2.0]), logarithmic=False)
    ((kind, line),) = chart["lines"]
    high = HEIGHT - TOP - BOTTOM
    spare = 0.12 / 2.24 * high
    expected = [[LEFT, TOP + high - spare], [(LEFT + WIDTH - RIGHT) / 2, TOP + high / 2], [WIDTH - RIGHT, TOP + spare]]
    assert kind == "mean"
    np.testing.assert_allclose(points(line), expected, atol=0.051)
    assert [label for label, _ in chart["rules"]] == ["0", "1", "2"]
    assert dict(chart["rules"])["1"] == pytest.approx(TOP + high / 2, abs=0.051)
    assert chart["steps"][0] == ("0", LEFT) and chart["steps"][-1] == ("100", WIDTH - RIGHT)


def test_many_points_are_thinned_and_smoothed():
    noise = np.where(np.arange(2000) % 2, 1.0, -1.0)
    chart = line_chart(np.arange(2000.0), noise + np.arange(2000) / 1000, logarithmic=False)
    (raw, all_points), (mean, smooth) = chart["lines"]
    assert (raw, mean) == ("raw", "mean") and len(points(all_points)) == len(points(smooth)) == 400
    heights = points(smooth)[20:-20, 1]
    assert np.abs(np.diff(heights)).max() < 0.1 * np.abs(np.diff(points(all_points)[:, 1])).max()


def test_a_logarithmic_chart_has_equal_distances_for_equal_factors():
    chart = line_chart(np.array([0.0, 1.0, 2.0]), np.array([0.01, 0.1, 1.0]), logarithmic=True)
    heights = points(chart["lines"][0][1])[:, 1]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert [label for label, _ in chart["rules"]] == ["0.01", "0.1", "1"]


def test_one_point_is_a_dot_and_a_level_line_stays_inside():
    chart = line_chart(np.array([7.0]), np.array([0.0]), logarithmic=False)
    assert not chart["lines"] and chart["dot"][0] == LEFT and TOP < chart["dot"][1] < HEIGHT - BOTTOM


def test_dots_have_whiskers_of_a_deviation():
    chart = dot_chart([("a", 0.5, 0.1), ("b", 0.7, 0.0)])
    (_, y, low, middle, high), (_, below, *flat) = chart["rows"]
    assert middle - low == pytest.approx(high - middle, abs=0.21) and high - low > 50
    assert len(set(flat)) == 1 and flat[0] > high and below > y

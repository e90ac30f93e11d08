"""Numbers as a person writes them, and tables as Markdown."""

import pytest

from dollar_jax.report.page import Cell, Table, cells, duration, figure, general, number, signed, significant, times


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123456, "12.3 ms"), (4, "4.00 s"), (62, "1 min 2 s"), (3599.9, "59 min 59 s"), (3600, "1 h 0 min")]
    + [(7199, "2 h 0 min"), (5430, "1 h 30 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers():
    assert [significant(v) for v in (0, 12345.6, -1.23456, 0.00123456, 1.5e-7)] == [
        "0",
        "12346",
        "\u22121.23",
        "0.00123",
        "1.50e\u221207",
    ]
    assert (signed(-0.5, 2), figure(-0.5, 1), general(-0.25), times(20), times(123.4)) == (
        "\u22120.50",
        "\u22120.5",
        "\u22120.25",
        "20.0×",
        "123×",
    )
    assert [number(v) for v in (True, "1", None, [], float("nan"), float("inf"), 2)] == [None] * 6 + [2.0]


def test_a_table_as_markdown_has_texts_and_marks_alone():
    table = Table(cells("a", "b"), [[Cell("1", small="hint"), Cell(mark="yes", kind="best")]])
    assert table.markdown() == "| a | b |\n| --- | --- |\n| 1 | yes |\n"

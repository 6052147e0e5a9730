"""Charts: round axes, escaped text, and coordinates where they belong."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from prefmill.report.background import lineage_graph
from prefmill.report.charts import (
    WIDTH,
    ChartInterval,
    Line,
    histogram,
    interval_chart,
    key_marker,
    line_chart,
    nice_ticks,
    scatter_chart,
    series_class,
    share_strip,
    thin,
    tick_label,
)
from prefmill.report.training_logs import bins

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.3, 9.7, [0, 5, 10]),
        (0, 1, [0, 0.5, 1]),
        (-2.1, 3.9, [-4, -2, 0, 2, 4]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (0, 0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high, 4)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    if low != 5:
        assert found == pytest.approx(ticks)


def test_tick_labels_have_no_needless_digits() -> None:
    labels = {0.1 + 0.2: "0.3", 0: "0", -1e-17: "0", -5: "−5", 50_000: "50000", 200_000: "2e+05", 0.0001: "1e−04"}
    assert {value: tick_label(value) for value in labels} == labels


def charts(label: str) -> list[str]:
    """One of every chart, with `label` wherever text goes in."""
    points = [(0.0, 1.0), (1.0, 2.0)]
    box = {"stage": label, "kind": label, "tasks": 1, "digest": label}
    graph = lineage_graph([[box], [{**box, "stage": "b"}], [{**box, "stage": "c"}]], [(label, "b"), (label, "c")])
    assert graph is not None
    return [
        interval_chart([ChartInterval(label, label, 1, 0, 2, label)], label, label, level=0.0),
        line_chart([Line(label, label, points)], label, label, label, reference=0.5),
        scatter_chart([Line(label, label, points)], label, label, label),
        share_strip([(label, 0.2), ("dpo", 0.9)], label),
        histogram([(0.0, 1.0, 3), (1.0, 2.0, 5)], label, label, label),
        key_marker(label),
        graph,
    ]


@pytest.mark.parametrize("values", [(1.0, 2.0), (-2.0, -1.0)])
def test_no_words_stand_on_the_line_of_no_difference(values: tuple[float, float]) -> None:
    low, high = values
    chart = interval_chart([ChartInterval("dpo", "dpo", low, low, high, "+1")], "t", "a", level=0.0)
    tree = ElementTree.fromstring(chart)
    (zero,) = (float(line.get("x1", "")) for line in tree.iter("line") if line.get("class") == "zero")
    words = [float(part.get("x", "")) for part in tree.iter("text") if str(part.get("class")).startswith("row-")]
    assert len(words) == 2
    assert all(abs(x - zero) >= 5 for x in words)


def test_no_text_can_become_markup() -> None:
    for chart in charts(HOSTILE):
        tree = ElementTree.fromstring(chart)
        allowed = {"svg", "title", "g", "line", "text", "circle", "polygon", "polyline", "rect", "path"}
        assert {node.tag for node in tree.iter()} <= allowed
        assert not [name for node in tree.iter() for name in node.keys() if name.startswith("on")]  # noqa: SIM118


def test_every_coordinate_is_inside_the_picture() -> None:
    for chart in charts("sft"):
        tree = ElementTree.fromstring(chart)
        _, _, width, height = (float(number) for number in tree.attrib["viewBox"].split())
        assert width <= WIDTH
        for node in tree.iter():
            for name, limit in (("x", width), ("x1", width), ("cx", width), ("y", height), ("y2", height)):
                assert 0 <= float(node.attrib.get(name, 0)) <= limit


def test_a_curve_goes_where_its_numbers_say() -> None:
    chart = line_chart([Line("loss", "sft", [(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)])], "t", "x", "y")
    points = re.search(r'polyline points="([^"]*)"', chart)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in points[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert y0 > y2  # larger is higher


def test_long_curves_are_thinned_by_means() -> None:
    points = [(float(index), float(index % 2)) for index in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert {y for _, y in thinned} == {0.5}
    assert thinned[-1][0] == 999
    assert thin(points[:3]) == points[:3]


def test_bins_hold_every_value() -> None:
    counted = bins([0.0, 0.1, 0.5, 1.0, 1.0], num_bins=4)
    assert [count for *_, count in counted] == [2, 0, 1, 2]
    assert (counted[0][0], counted[-1][1]) == (0, 1)
    assert sum(count for *_, count in bins([2.0, 2.0])) == 2


def test_a_label_never_reaches_a_class_name() -> None:
    assert series_class("dpo") == "s-dpo"
    assert re.fullmatch(r"s-other\d", series_class(HOSTILE))

"""The Grafana dashboard asks for nothing that /metrics does not have."""

from __future__ import annotations

import json
import pathlib
import re

from prometheus_client.parser import text_string_to_metric_families

from tests.engine.server.conftest import serving

DASHBOARD = pathlib.Path(__file__).parents[1] / "docs" / "grafana.json"


def test_every_metric_of_the_dashboard_exists():
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [entry["query"] for entry in board["templating"]["list"]]
    names = {name for query in asked for name in re.findall(r"quire:\w+", query)}
    with serving() as server:
        server.complete(max_tokens=3)
        families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    samples = {sample.name for family in families for sample in family.samples}
    assert len(names) >= 15
    assert names - samples == set()
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    assert all("model_name" in labels[name] for name in names)


def test_panels_do_not_cover_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        taken |= cells

"""What a run shows in Ray's metrics, and the dashboard that shows them in Grafana."""

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.util import metrics

from ghost_dist.cluster import pool
from ghost_dist.cluster.leases import Lease, Worker
from ghost_dist.cluster.session import recover_on_cluster

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "launch/grafana_dashboard.json").read_text())
QUERIES = {p["title"]: [t["expr"] for t in p["targets"]] for p in DASHBOARD["panels"]}
EVERY_QUERY = "".join(query for queries in QUERIES.values() for query in queries)


@pytest.fixture(scope="module")
def exported():
    """Labels of the metrics by their names at the Prometheus port."""
    made = [m for m in vars(pool._Metrics({})).values() if isinstance(m, metrics.Metric)]
    return {f"ray_{m.info['name']}": set(m.info["tag_keys"]) for m in made}


def test_dashboard_and_code_name_the_same_metrics(exported):
    shown = set(re.findall(r"\w*ghost_dist\w*", EVERY_QUERY))
    assert shown == exported.keys()
    variables = DASHBOARD["templating"]["list"]
    asked = {name for v in variables for name in re.findall(r"\w*ghost_dist_\w*", str(v["query"]))}
    assert asked <= exported.keys()
    page = (ROOT / "docs/cluster.md").read_text()
    assert set(re.findall(r"^\| `(ray_ghost_dist\w*)`", page, re.MULTILINE)) == exported.keys()


def test_dashboard_uses_labels_that_the_metrics_have(exported):
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (keys,) = {frozenset(exported[n]) for n in re.findall(r"ray_\w+", target["expr"])}
            legend = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert re.findall(r"by \((\w+)\)", target["expr"]) == legend
            assert set(legend) <= keys, panel["title"]
            # A label that Ray adds: without it runs of several drivers are added up.
            assert target["expr"].count("ray_") == target["expr"].count('WorkerId=~"$driver"')


def test_dashboard_has_what_grafana_asks_for():
    """Fields that have no default, or whose default would bind it to one Grafana."""
    assert DASHBOARD["id"] is None  # given by the Grafana that imports it
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["title"]
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(re.findall(r"\$(\w+)", EVERY_QUERY)) == variables.keys() - {"datasource"}
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken = set()
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x + w <= 24
        cells = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
        assert not taken & cells
        taken |= cells


@pytest.fixture
def told(monkeypatch):
    """Values that gauges were set to, by name and tag."""
    values = defaultdict(lambda: defaultdict(list))

    def record(self, value, tags=None):
        values[self.info["name"]][" ".join((tags or {}).values())].append(value)

    monkeypatch.setattr(metrics.Gauge, "set", record)
    return values


def test_a_replica_that_is_gone_has_no_rate(told):
    """Its last one would be added to that of its successor, as long as the driver lives."""
    lease = Lease(0, "a", Worker(7), time.monotonic() - 2)
    replicas = {7: SimpleNamespace(number=7, state="busy", under_way=[(lease, 100)])}
    shown = pool._Metrics(replicas)
    shown.show_replicas()
    assert told["ghost_dist_tokens_per_second"]["7"] == [pytest.approx(50, rel=0.1)]
    assert told["ghost_dist_replicas"]["busy"] == [1]
    replicas.clear()
    shown.show_replicas()
    assert told["ghost_dist_tokens_per_second"]["7"][1:] == [0]
    assert told["ghost_dist_replicas"]["busy"] == [1, 0]


def test_gauges_at_the_end_of_a_run(make_config, cluster, told):
    config = make_config(cluster__address=cluster.address, engine__kind="resident")
    recover_on_cluster(config, again="calibrate")
    ranges, replicas = told["ghost_dist_ranges"], told["ghost_dist_replicas"]
    assert (ranges["pending"][-1], ranges["leased"][-1]) == (0, 0)
    assert told["ghost_dist_tokens"][""][-1] == 16 * 64
    assert any(max(values) > 0 for values in replicas.values())
    assert {values[-1] for values in replicas.values()} == {0}

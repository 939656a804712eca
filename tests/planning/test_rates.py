"""The cache of rates, and memory below limits."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch

from ghost_dist import devices as memory
from ghost_dist.planning.rates import Rates, cache_file, store_rates, stored_rates

RATES = Rates(
    device="X",
    read=1e9,
    read_from="checkpoint",
    load=2e9,
    write=5e8,
    products={"bfloat16": 5e14, "float64": 5e13, "kind": 1e14, "stream": 4e13},
    factors={"stream": 1e12},
    process_s=3.0,
    measured_s=8.0,
)


def test_rates_come_back_from_the_cache_under_the_same_circumstances_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = {"device": "X", "torch": "2.13"}
    assert stored_rates(key) is None
    store_rates(key, RATES)
    assert stored_rates(key) == RATES
    assert stored_rates({**key, "torch": "2.14"}) is None
    assert json.loads(cache_file(key).read_text())["key"] == key


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"rates": {"device": "X"}}', b"[1]"])
def test_a_damaged_cache_is_measured_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_rates({"device": "X"}, RATES)
    cache_file({"device": "X"}).write_bytes(damage)
    assert stored_rates({"device": "X"}) is None


def test_every_rate_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_rates({}, RATES)
    tree = json.loads(cache_file({}).read_text())["rates"]
    assert tree.keys() == {field.name for field in dataclasses.fields(Rates)}


def test_a_ulimit_bounds_what_is_free():
    code = (
        "import torch\nfrom ghost_dist.devices import free_bytes\n"
        "print(free_bytes(torch.device('cpu')))"
    )

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limited, capture_output=True, text=True, check=True
    )
    assert 1 << 30 < int(done.stdout) < 3 << 30


def test_a_control_group_bounds_what_is_free_but_for_file_pages(tmp_path, monkeypatch):
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\nactive_file 300\n")
    limit.write_text("1500\n")
    usage.write_text("1100\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(usage)),))
    assert memory.free_bytes(torch.device("cpu")) == 1500 - 1100 + 500
    limit.write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20

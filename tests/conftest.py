"""A part of the largest products of methods and families in a usual run, all of them with TSUGIKI_TESTS=all; a fixture."""
from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config, items):
    """Of a test marked share(n), every n-th combination, along the diagonals: of two parameters with n values or
    more, each value is among them; of one, every n-th."""
    if os.environ.get("TSUGIKI_TESTS") == "all":
        return
    left_out = []
    for item in items:
        mark = item.get_closest_marker("share")
        if mark and sum(item.callspec.indices.values()) % mark.args[0]:
            left_out.append(item)
    if left_out:
        gone = set(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture
def engines():
    """Makes serving engines (tests/serving.py), which are stopped at the end, whatever happened."""
    made = []
    yield lambda served, *names, **options: made.append(served.engine(*names, **options)) or made[-1]
    for engine in made:
        engine.stop(drain=False)

"""A new method file is covered without touching a test: one is added to a copy of the package, and the generated tests see it."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = '''"""A change of rank one beside each linear, for a test."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..route import Context
from ..sites import Site


class GraftEdit(Edit):
    """y + s * up (down . x)"""

    def __init__(self, config: Graft, site: Site, start: Start):
        super().__init__(config, site, start)
        self.down = start.parameter(f"{site.name}.down", site.d_in, fill=lambda t, g: t.normal_(0, site.d_in ** -0.5, generator=g))
        self.up = start.parameter(f"{site.name}.up", site.d_out)
        self.strength = config.strength

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + (x @ self.down.to(x.dtype))[..., None] * (self.strength * self.up).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w + self.strength * torch.outer(self.up.to(w), self.down.to(w)), b


@dataclass(frozen=True, kw_only=True)
class Graft(Config):
    """Graft. Trains d_in + d_out numbers a site."""
    strength: float = setting(1.0, "what the change is multiplied with")
    targets: tuple[str, ...] | str = setting("linear", "roles, a regex, or linear")

    name: ClassVar[str] = "graft"
    edit: ClassVar[type[Edit]] = GraftEdit
    lr: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[dict, ...]] = ({"strength": 0.5},)
'''
MERGE = "w + self.strength * torch.outer"
POST = "(x @ self.down.to(x.dtype))[..., None]"
UP = 'self.up = start.parameter(f"{site.name}.up", site.d_out)'
# What is wrong -> (a line, what it becomes, the tests of which each must fail)
FAULTS = {
    "its merge has the wrong sign": (MERGE, MERGE.replace("+", "-"), {
        "test_the_merged_base_equals_the_adapter_and_unmerging_restores_every_bit"}),
    "it looks at the batch": (POST, f"({POST} - {POST}.mean(0, keepdim=True))", {
        "test_one_batch_of_every_method_equals_each_row_alone"}),
    "one of its parameters gets no gradient": (UP, UP + '; self.idle = start.parameter("idle", 3)', {
        "test_one_batch_of_every_method_equals_each_row_alone", "test_only_the_adapter_trains_and_the_base_keeps_its_bits"}),
    "it draws from the global generator": ("t.normal_(0, site.d_in ** -0.5, generator=g)", "t.normal_(0, site.d_in ** -0.5)", {
        "test_nothing_is_drawn_from_the_global_generators_and_starts_are_repeatable"}),
}
FILES = ("test_core.py", "test_merge.py", "test_formats.py", "test_conformance.py")
# Some of the generated tests are enough to see that each kind of promise is asked of the new method.
ASKED = ("identity_method or each_row_alone or keeps_its_bits or padding or checkpointing or bases or deep_copy or original_bits "
         "or restores_every_bit or loading_is or central or as_alone or threads or global or steps")
# In one process, so that torch is imported once; the package and the tests are imported anew for each file.
DRIVER = """
import json, sys
from pathlib import Path
import pytest
for file, code, wanted, paths in json.load(sys.stdin):
    Path(file).write_text(code, encoding="utf-8")
    for name in list(sys.modules):
        if name.split(".")[0] in ("tsugiki", "tiny", *(Path(p).stem for p in paths)):
            del sys.modules[name]
    print("RUN", flush=True)
    pytest.main(["-rA", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider", "-o", "addopts=", "-k", wanted, *paths])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What is wrong with the method, or None -> (passed, failed) tests, on a copy of the package with that method in it."""
    copy = tmp_path_factory.mktemp("copy") / "tsugiki"
    shutil.copytree(ROOT / "src" / "tsugiki", copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (copy / "assets").symlink_to(ROOT / "src" / "tsugiki" / "assets")
    file, paths = str(copy / "methods" / "graft.py"), [str(ROOT / "tests" / f) for f in FILES]
    jobs = [(file, FILE, f"(llama or gpt2) and ({ASKED})", paths)]
    for line, wrong, catchers in FAULTS.values():
        assert FILE.count(line) == 1
        jobs.append((file, FILE.replace(line, wrong), f"llama and ({' or '.join({*catchers, 'restores_every_bit'})})", paths))
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env = plain | {"PYTHONPATH": str(copy.parent), "TSUGIKI_METHODS": "graft", "TSUGIKI_TESTS": "all",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(jobs), env=env, cwd=ROOT, capture_output=True, text=True)
    outputs = done.stdout.split("RUN\n")[1:]
    assert len(outputs) == len(jobs) and not re.search("^ERROR ", done.stdout, re.M), done.stdout[-3000:] + done.stderr[-3000:]
    return {name: tuple(set(re.findall(rf"^{word} \S*::(\S+)", out, re.M)) for word in ("PASSED", "FAILED"))
            for name, out in zip((None, *FAULTS), outputs, strict=True)}


def test_every_generated_test_runs_over_a_new_method_and_passes(runs):
    passed, failed = runs[None]
    assert not failed
    assert len(passed) > 30, sorted(passed)
    cases = [f"graft{variant}-{kind}" for variant in ("", ".strength-0.5") for kind in ("llama", "gpt2")]
    assert {f"test_saving_and_loading_is_the_identity[{case}]" for case in cases} <= passed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_new_method_that_is_wrong_is_caught_by_name(runs, fault):
    passed, failed = runs[fault]
    assert FAULTS[fault][2] <= {name.partition("[")[0] for name in failed}, failed
    assert passed, "nothing passed, so that the rest is no evidence of this fault"

"""A thousand damaged adapter folders, of every method: each is refused in one line that says where, or loads as what it says."""
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import damage
import peft
import pytest
import torch
from damage import CONFIG, DAMAGES, MANIFEST, TENSORS, Case
from tiny import METHOD_CASES, fill, ids, tiny

from tsugiki.adapters import Adapters, attach
from tsugiki.errors import UserError
from tsugiki.methods import METHODS

F64 = torch.float64
ROUNDS = int(os.environ.get("DAMAGED_FOLDERS", 1600))                                         # folders in all, at the least
KINDS = ("ours", "plain")                             # with its manifest; PEFT's files alone
X = ids(2, 6)


class World:
    """Three bases; every method's folders, made once."""

    def __init__(self, room: Path):
        self.room, self.count = room, 0
        self.model = tiny("llama", F64)
        self.plain = copy.deepcopy(self.model)
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.01)
        self.homes = {"": attach(self.model), "weights": attach(other),
                      "shapes": attach(tiny("llama", F64, hidden_size=32, intermediate_size=96))}
        self.plains = {"": self.plain, "weights": copy.deepcopy(self.plain)}
        with torch.no_grad():
            for p in self.plains["weights"].parameters():
                p.mul_(1.01)
        self.folders, self.right = {}, {}
        for case, cfg in METHOD_CASES.items():
            for n in range(2):
                adapter = fill(self.homes[""].add("x", cfg), seed=n + 1)
                for p in adapter.parameters().values():
                    p.data = p.data.float()           # PEFT keeps some tables in float32: so that it can hold these numbers
                self.homes[""].save("x", room / "made")
                self.folders[case, n] = damage.read(room / "made")
                self.homes[""].remove("x")
                shutil.rmtree(room / "made")
        plain = [c for c in METHOD_CASES if b'"peft_type"' in self.folders[c, 0][CONFIG]]
        self.pairs = [(c, "ours") for c in METHOD_CASES] + [(c, "plain") for c in plain]

    def case(self, case: str, kind: str, seed: int) -> Case:
        def only(files):
            return {n: d for n, d in files.items() if kind == "ours" or n != MANIFEST}
        draw = random.Random(f"{case} {kind} {seed}")
        strangers = sorted({c for c, k in self.pairs if k == kind and METHOD_CASES[c].name != METHOD_CASES[case].name})
        return Case(draw, *(only(self.folders[k]) for k in ((case, 0), (case, 1), (draw.choice(strangers), 0))))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with torch.no_grad():
        yield World(tmp_path_factory.mktemp("damage"))


def state(adapters: Adapters):
    """Everything of a model that an adapter could leave something in."""
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), type(m)) for n, m in adapters.model.named_modules()]
    return (adapters.names(), adapters.active, adapters.virtual.copy(), adapters.placed.copy(), hooks,
            [n for n, _ in adapters.model.named_parameters()], [n for n, _ in adapters.model.named_buffers()])


def too_long(*_):
    raise AssertionError("took more than ten seconds")


def load(adapters: Adapters, folder: Path):
    """The adapter, or the line that refuses it. Nothing else may come of it: no other exception, no warning, no hang."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    before = state(adapters)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return adapters.load("x", folder)
    except UserError as e:
        assert state(adapters) == before, "something was left behind"
        return str(e)
    finally:
        signal.alarm(0)


def as_peft_reads_it(model, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).double().eval()
    assert not [w for w in said if "adapter keys" in str(w.message)], "loaded, but PEFT does not find its tensors"
    return read(input_ids=X, attention_mask=torch.ones_like(X)).logits[:, -X.shape[1]:]


def meaning(files: damage.Files):
    return json.loads(files[CONFIG]), damage.unpack(files[TENSORS])


def judge(world: World, case: str, kind: str, what: str, seed: int) -> str | None:
    """One damaged folder: "refused", "the same" or "another adapter"; None if this damage cannot be done to it."""
    there = world.case(case, kind, seed)
    if DAMAGES[what](there) is False:
        return None
    folder, adapters = world.room / "x", world.homes[there.base]
    shutil.rmtree(folder, ignore_errors=True)
    damage.write(there.files, folder)
    found = load(adapters, folder)
    if isinstance(found, str):
        named = [n for n in (CONFIG, TENSORS, MANIFEST) if f"{folder / n}: " in found]
        loose = ("tensor ", "not a whole", "holds no tensor")                 # where it is not one field or tensor that is refused
        assert "\n" not in found and len(found) < 900 and found.isprintable() and named, found
        if kind == "plain" or TENSORS in named:
            assert not there.about or any(a in found for a in (*there.about, *loose)) or named == [CONFIG], found
        if what.startswith("tensor "):
            assert any(a in found for a in (*there.about, *loose[1:])), found
        return "refused"
    logits = adapters.model(X, adapter_ids="x").logits
    adapters.remove("x")
    same = there.base == "" and meaning(there.files) == meaning(world.folders[case, 0])
    if kind == "ours":
        assert same, "loaded, although its manifest is of something else"
    if same:
        if case not in world.right:
            shutil.rmtree(folder)
            damage.write(world.folders[case, 0], folder)
            adapters.load("x", folder)
            world.right[case] = adapters.model(X, adapter_ids="x").logits
            adapters.remove("x")
            assert not torch.equal(world.right[case], adapters.model(X, adapter_ids=()).logits)
        assert torch.equal(logits, world.right[case]), "loaded as another adapter"
        return "the same"
    expected = as_peft_reads_it(world.plains[there.base], folder)
    scale = float(expected.abs().max().nan_to_num(1.0, 1.0, 1.0)) + 1
    assert torch.allclose(logits, expected, rtol=1e-12, atol=1e-12 * scale, equal_nan=True), "loaded as another adapter"
    return "another adapter"


def plan(world: World) -> list[tuple[str, str, str, int]]:
    """Every damage, on enough folders, drawn from all."""
    draw, each = random.Random(0), -(-ROUNDS // len(DAMAGES))
    found = []
    for what in DAMAGES:
        kinds = [k for k in KINDS for _ in range(-(-each // 2))]
        found += [(draw.choice([c for c, k in world.pairs if k == kind]), kind, what, n) for n, kind in enumerate(kinds)]
    covered = {f[:2] for f in found}
    return found + [(*pair, "tensor cut", 0) for pair in world.pairs if pair not in covered]


def test_a_thousand_damaged_folders_are_refused_or_load_as_what_they_say(world):
    wrong, tally, used = [], {}, {}
    draw = random.Random(1)
    for case, kind, what, seed in plan(world):
        tried = [case, *draw.sample(sorted({c for c, k in world.pairs if k == kind}), k=min(6, len(world.pairs) // 3))]
        for name in tried:                            # the next one, where this damage cannot be done
            try:
                result = judge(world, name, kind, what, seed)
            except Exception as e:                    # every one of them, before the test fails
                for home in world.homes.values():
                    if "x" in home.names():
                        home.remove("x")
                result = "wrong"
                wrong.append(f"{name} ({kind}), {what}, seed {seed}: {type(e).__name__}: {str(e).splitlines()[0][:300]}")
            if result is not None:
                tally[kind, result] = tally.get((kind, result), 0) + 1
                used.setdefault(what, set()).add(name)
                break
    for (kind, result), count in sorted(tally.items()):
        print(f"{kind:6} {result:16} {count:5}")
    assert not wrong, f"{len(wrong)} of {sum(tally.values())}:\n" + "\n".join(wrong)
    assert sum(tally.values()) >= 1000 and not DAMAGES.keys() - used.keys(), DAMAGES.keys() - used.keys()
    assert tally["ours", "refused"] > 400 and tally["plain", "refused"] > 300 and tally["plain", "another adapter"] > 20


def test_every_method_is_among_the_folders(world):
    assert {c for c, _ in world.pairs} == set(METHOD_CASES)
    assert {METHOD_CASES[c].peft.kind for c, k in world.pairs if k == "plain"} == {
        cls.peft.kind for cls in METHODS.values() if cls.peft and cls().parts}


LISTEN = """
import random, sys, warnings
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_damage as t
from damage import DAMAGES, write
heard, names = [], ("import", "exec", "compile", "os.system", "subprocess", "socket", "os.exec", "os.posix_spawn", "pickle", 
                    "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir", "marshal", "code.__new__", "urllib", "shutil")
def hook(event, args):
    if heard and heard[0] and event.startswith(names):
        heard.append((event, str(args)[:80]))
sys.addaudithook(hook)
room = Path(sys.argv[3])
world, draw, done = t.World(room), random.Random(5), 0
for case, kind in world.pairs:                        # what is imported late is imported now
    write(world.case(case, kind, 0).files, room / f"{case}-{kind}")
    world.homes[""].load("x", room / f"{case}-{kind}"); world.homes[""].remove("x")
heard.append(False)
while done < 120:
    case, kind = draw.choice(world.pairs)
    there = world.case(case, kind, done)
    if draw.choice(list(DAMAGES.values()))(there) is False:
        continue
    write(there.files, room / str(done))
    done, heard[0] = done + 1, True
    try:
        world.homes[there.base].load("x", room / str(done - 1)); world.homes[there.base].remove("x")
    except t.UserError:
        pass
    heard[0] = False
print(done, "loads;", sorted(set(heard[1:])))
"""


def test_a_load_imports_runs_and_connects_to_nothing(tmp_path):
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", LISTEN, here, here.parent / "src", tmp_path], capture_output=True, text=True)
    assert run.stdout == "120 loads; []\n", run.stdout + run.stderr[-2000:]

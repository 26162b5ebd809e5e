"""What becomes of a damaged adapter folder without a manifest: here, and in the installed Hugging Face PEFT.

    python benchmarks/damaged_adapters.py [--seeds 3]

Every kind of damage in tests/damage.py that can be done to a plain PEFT folder of LoRA on a tiny random Llama. For each:
right (the output is the one that the folder defines), refused (an exception), or wrong (it loads, with another output). The
folder defines something only where its tensors, names and fields are those of one adapter and all are used: what that output
is, PEFT's own reading says, and it counts as right only if PEFT finds a tensor for each of its parameters and no other.
Where this library refuses and PEFT loads, a person has to judge: PEFT's column shows whether it warned, and whether what it
loaded is the undamaged adapter, another, or none at all (the base's own output).
"""
from __future__ import annotations

import argparse
import collections
import copy
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import peft
import torch
from damage import CONFIG, DAMAGES, Case, write
from test_damage import World, X

from tsugiki.errors import UserError


def ours(world: World, there: Case, folder: Path) -> tuple[str, torch.Tensor | None]:
    home = world.homes[there.base]
    try:
        home.load("x", folder)
    except UserError:
        return "refused", None
    logits = home.model(X, adapter_ids="x").logits
    home.remove("x")
    return "loaded", logits


def theirs(world: World, there: Case, folder: Path) -> tuple[str, torch.Tensor | None]:
    model = copy.deepcopy(world.plains[there.base])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            read = peft.PeftModel.from_pretrained(model, folder).double().eval()
            logits = read(input_ids=X).logits[:, -X.shape[1]:]
        except Exception:
            return "refused", None
    said = [str(w.message) for w in said if w.category is UserWarning]        # not what transformers says of itself each time
    missing = any("adapter keys" in text for text in said)
    return "loaded, tensors missing" if missing else "loaded, warned" if said else "loaded", logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-10, equal_nan=True)


def row(world: World, what: str, seed: int) -> tuple[str, str] | None:
    there = world.case("lora", "plain", seed)
    if DAMAGES[what](there) is False or there.base == "shapes" or "bomb" in what:
        return None                                   # PEFT may never come back from a bomb
    folder = world.room / "x"
    shutil.rmtree(folder, ignore_errors=True)
    write(there.files, folder)
    (mine, a), (peft_says, b) = ours(world, there, folder), theirs(world, there, folder)
    base, right = (world.right["base"], world.right["lora"]) if not there.base else (None, None)
    if b is not None:
        if mine == "loaded" and same(a, b) and "missing" not in peft_says:
            mine, peft_says = "right", peft_says.replace("loaded", "right")
        elif base is not None:
            what_it_is = "NaN" if b.isnan().any() else "the base alone" if same(b, base) else \
                "the undamaged" if same(b, right) else "another"
            peft_says = f"{peft_says}: {what_it_is}"
    return mine, peft_says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as room:
        world = World(Path(room))
        plain = world.case("lora", "plain", 0)
        write(plain.files, world.room / "plain")
        world.right["base"] = world.model(X, adapter_ids=()).logits
        world.right["lora"] = ours(world, plain, world.room / "plain")[1]
        print(f"| damage to a LoRA folder ({CONFIG} and its tensors) | here | PEFT {peft.__version__} |\n|---|---|---|")
        total: dict[str, collections.Counter] = {"here": collections.Counter(), "PEFT": collections.Counter()}
        for what in DAMAGES:
            found = [r for seed in range(seeds) if (r := row(world, what, seed)) is not None]
            for mine, peft_says in found:
                total["here"][mine] += 1
                total["PEFT"][peft_says] += 1
            if found:
                counts = [collections.Counter(column) for column in zip(*found, strict=True)]
                cells = [", ".join(f"{n} {w}" for w, n in c.items()) for c in counts]
                print(f"| {what} | {' | '.join(cells)} |")
        for who, counts in total.items():
            print(f"\n{who}: {sum(counts.values())} folders: " + ", ".join(f"{n} {w}" for w, n in counts.most_common()))


if __name__ == "__main__":
    main()

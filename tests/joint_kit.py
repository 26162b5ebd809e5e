"""Joint runs for the tests: jobs drawn by a seed, tiny and in float64; what they leave; a fault in one of them at a tick."""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import torch
from kit import ADAPTERS, TOKENIZER, go, llama, metrics, result_bits, write
from torch import nn

from tsugiki.adapters import attach
from tsugiki.config import RunConfig, build
from tsugiki.formats.native import settings
from tsugiki.train import step as step_module
from tsugiki.train.failure import Failure
from tsugiki.train.jobs import JobConfig, Turn
from tsugiki.train.joint import Joint

NAMES = list(ADAPTERS)
SIZE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
MARK = "#"                                            # a token that only a marked job's rows hold


def model() -> nn.Module:
    return llama(torch.float64, **SIZE)


def rows(rng: random.Random, count: int, mark: str = "") -> list[dict]:
    """Rows of 4 to 12 tokens."""
    def text(most: int) -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, most)))
    return [{"prompt": text(5 - len(mark)) + mark, "completion": text(4)} for _ in range(count)]


def draw(seed: int, folder: Path, most: int = 16, sure: dict | None = None) -> list[JobConfig]:
    """Jobs in `folder`, their data beside them: methods in turn from seed to seed, everything else by chance. `sure`: settings
    of the first job that are not left to it."""
    rng, jobs = random.Random(seed), []
    count = min(most, rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 16]))
    for n in range(count):
        method = ADAPTERS[NAMES[(4 * seed + n) % len(NAMES)]]
        virtual = any(part.edit.virtual for part in method.parts)
        looks = rng.random() < 0.2
        train = {"steps": rng.randint(2, 4), "lr": 10 ** rng.uniform(-4, -2.5), "batch_size": rng.randint(1, 4),
                 "schedule": rng.choice(["cosine", "linear", "constant"]), "warmup": rng.choice([0.0, 0.5]), "log_steps": 1,
                 "seed": rng.randrange(9), "clip": rng.choice([0.0, 0.01, 1.0]), "weight_decay": rng.choice([0.0, 0.1]),
                 "layout": rng.choice(["auto", "pad"] if virtual else ["auto", "pad", "pack"]), "save_steps": 1,
                 "max_length": rng.choice([9, 512])}
        if looks:
            train |= {"eval_steps": 1} | rng.choice([{"patience": 1}, {"keep": "best"}, {}])
        name = f"job{n}"
        values = {"method": {"name": method.name} | settings(method), "train": train}
        values["eval"] = {"metric": "loss", "max_new_tokens": 2}
        if n == 0 and sure:
            values["train"] |= sure
            looks = looks or bool(sure.get("eval_steps"))
        held = {"eval": [str(write(folder / "data" / f"{name}-held.jsonl", rows(rng, 2)))]} if looks else {}
        made = rows(rng, rng.randint(3, 8), MARK * (n == 0))
        values["data"] = {"files": [str(write(folder / "data" / f"{name}.jsonl", made))]} | held
        run = build(RunConfig, values | {"base": "", "out": str(folder / "out" / name), "adapter": name})
        jobs.append(JobConfig(name, run, Turn(weight=rng.choice([0.5, 1.0, 3.0]), start=rng.choice([0, 0, 0, 2]))))
    return jobs


def budget(seed: int) -> int | None:
    """Tokens of a tick: all jobs' steps, or few."""
    return random.Random(seed + 1000).choice([None, None, 30, 60])


def joint(jobs: list[JobConfig], tokens: int | None = None, at: Callable[[Joint], None] = lambda joint: None,
          base: nn.Module | None = None) -> Joint:
    """The jobs to their end; `at` is called before every tick."""
    with Joint(base or model(), TOKENIZER, Path(jobs[0].run.out).parent, tokens=tokens, quiet=True) as made:
        for job in jobs:
            made.admit(job)
        while made.jobs:
            at(made)
            made.tick()
    return made


def alone(job: JobConfig, folder: Path) -> dict[str, torch.Tensor]:
    """What the same job trains in a run of its own."""
    return result_bits(go(dataclasses.replace(job.run, out=str(folder / job.name)), model()))


def bits(made: Joint) -> dict[str, dict[str, torch.Tensor]]:
    return {name: result_bits(r) for name, r in made.results.items() if not isinstance(r, Failure)}


def lines(made: Joint) -> dict[str, list[dict]]:
    return {name: metrics(r.out) for name, r in made.results.items() if not isinstance(r, Failure)}


# Faults. Each is put in before a tick, and takes the first job with it.

def uses(ids: object, name: str) -> bool:
    """Whether adapter_ids, of any form, name an adapter."""
    ids = getattr(ids, "ids", ids)
    return ids == name or isinstance(ids, (list, tuple)) and name in ids


def in_forward(error: Exception):
    def put(made: Joint, name: str, patch) -> None:
        plain = step_module.token_losses

        def losses(model, batch, **route):
            if uses(route["adapter_ids"], name):
                raise error
            return plain(model, batch, **route)
        patch.setattr(step_module, "token_losses", losses)
    return put


def bad_weights(made: Joint, name: str, patch) -> None:
    with torch.no_grad():
        next(iter(made.jobs[name].it.params.values())).view(-1)[0] = float("nan")


def bad_token(made: Joint, name: str, patch) -> None:
    with torch.no_grad():
        made.model.get_input_embeddings().weight[TOKENIZER.encode(MARK, add_special_tokens=False)] = float("inf")


def bad_gradient(made: Joint, name: str, patch) -> None:
    list(made.jobs[name].it.params.values())[-1].register_hook(lambda g: g * float("nan"))


def bad_scores(made: Joint, name: str, patch) -> None:
    def score():
        raise ValueError("the scorer broke")
    steps = made.jobs[name].steps
    steps.job = dataclasses.replace(steps.job, evaluate=score)


def bad_update(made: Joint, name: str, patch) -> None:
    def update():
        raise RuntimeError("the update broke")
    made.jobs[name].steps.optimizer.step = update


def full_disk(made: Joint, name: str, patch) -> None:
    def finish(self, progress, steps):
        raise OSError(28, "No space left on device", str(self.cfg.out))
    kind = type(made.jobs[name].it)
    plain = kind.finish
    patch.setattr(kind, "finish", lambda self, *a: (finish if self.cfg.adapter == name else plain)(self, *a))


# kind -> (how it is put in, what the reason says, whether the tick is taken with it)
FAULTS = {
    "weights that are not finite": (bad_weights, "not finite in|weights are not finite", False),
    "a row that is not finite": (bad_token, r"loss is not finite in .*job0\.jsonl:\d", False),
    "a gradient that is not finite": (bad_gradient, r"gradient of .* is not finite", False),
    "out of memory in its forward": (in_forward(torch.OutOfMemoryError("CUDA out of memory")), "no memory for a row of", False),
    "an exception in its forward": (in_forward(KeyError("what")), "KeyError: 'what'", False),
    "an exception in its evaluation": (bad_scores, "ValueError: the scorer broke", True),
    "an exception in its update": (bad_update, "the update failed .the update broke", True),
    "a full disk when it is saved": (full_disk, "No space left", True),
}


def attached_only(made: Joint, names: set[str]) -> bool:
    """Whether the base holds these adapters and no others."""
    return set(attach(made.model).names()) == names

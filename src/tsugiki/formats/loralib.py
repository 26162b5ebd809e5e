"""loralib checkpoints (microsoft/LoRA, Hu et al. 2021, arXiv:2106.09685) as Hugging Face PEFT folders, number for number.

loralib saves a dict `...<module>.lora_A` (r, d_in) and `...<module>.lora_B` (d_out, r), and what else was trained. It does
not save alpha: the change is alpha / r * B A. A MergedLinear holds one such pair for each enabled part of a fused weight:
A (parts * r, d_in), B (parts * d_out / len(enable_lora), r), without saying which parts; as one LoRA that is a B of blocks.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .disk import CONFIG, TENSORS, pack_tensors, to_json, write_folder
from .torchfile import state_dict

FUSED = r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|in_proj)$"  # last names under which a MergedLinear is found
CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}       # GPT-2's layers keep their weights as (in, out)
EMBEDDING = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*)(\.\d+)?$")
LOW, HIGH = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class Pair:
    """One module's change, alpha / rank * B A: a (rank, d_in), b (d_out, rank), and the parts it came in."""
    a: Tensor
    b: Tensor
    parts: int = 1                                    # of a MergedLinear; its alpha grows with its rank

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, and what it was told to leave out."""
    modules: tuple[str, ...]
    ranks: Mapping[str, int]
    left_out: tuple[str, ...]


def convert(file: str | Path, out: str | Path, alpha: float, *, leave_out: str | None = None,
            rename: Iterable[tuple[str, str]] = (), enable_lora: Sequence[bool] | None = None,
            fused: str = FUSED, base: str | None = None) -> Converted:
    """Write a loralib checkpoint as a PEFT folder. Nothing in the file is run.

    alpha: loralib's lora_alpha, which the file lacks. leave_out: a regex searched in tensor names; these are not converted.
    rename: (from, to) beginnings of module names, the first that fits. enable_lora: which parts of a fused weight are trained,
    in order, for modules whose name `fused` is found in. base: the base's name, kept in the folder. Raises UserError, and
    writes nothing, for tensors that are neither converted nor left out, and for pairs that do not fit.
    """
    file = Path(file)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha: must be a number above 0, got {alpha}")
    fits = _regex(fused, "fused")
    tensors, left = _without(state_dict(file), leave_out, file)
    pairs = {}
    for module, (a, b) in _paired(tensors, file).items():
        new = _renamed(module, tuple(rename), file)
        if new in pairs:
            raise UserError(f"{file}: two modules would both be called {new}")
        pairs[new] = _pair(module, a, b, enable_lora if fits.search(module) else None, bool(fits.search(module)), file)
    for start, _ in rename:
        if not any(m.removesuffix(LOW).startswith(start) for m in tensors):
            raise UserError(f"{file}: rename {start!r}: no module's name begins so; they begin with {next(iter(tensors))!r}")
    if enable_lora is not None and not any(fits.search(m.removesuffix(LOW)) for m in tensors):
        raise UserError(f"{file}: enable_lora is given, but no module's name fits {fused!r}")
    out = Path(out)
    packed = pack_tensors(_peft_tensors(pairs), out / TENSORS)
    write_folder(out, {TENSORS: packed, CONFIG: to_json(_peft_config(pairs, alpha, base))})
    return Converted(tuple(pairs), {m: p.rank for m, p in pairs.items()}, left)


def _regex(text: str, what: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as e:
        raise UserError(f"{what}: {text!r} is not a regular expression: {e}") from None


def _without(tensors: dict[str, Tensor], leave_out: str | None, file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The pairs' tensors; what else is there must be left out in so many words."""
    left: tuple[str, ...] = ()
    if leave_out is not None:
        pattern = _regex(leave_out, "leave_out")
        left = tuple(n for n in tensors if pattern.search(n))
        if not left:
            raise UserError(f"{file}: leave_out: {leave_out!r} is found in no tensor's name")
    kept = {n: t for n, t in tensors.items() if n not in left}
    others = [n for n in kept if not n.endswith((LOW, HIGH))]
    if not any(n.endswith((LOW, HIGH)) for n in kept):
        raise UserError(f"{file}: holds no lora_A and lora_B to convert; the first of its {len(tensors)} tensors is "
                        f"{next(iter(tensors))!r}")
    if others:
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        raise UserError(f"{file}: also holds {', '.join(others[:6])}{more}, which a LoRA folder has no place for; "
                        "to convert without them give leave_out, a regex over tensor names")
    return kept, left


def _paired(tensors: dict[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in tensors:
        module = name.removesuffix(LOW if name.endswith(LOW) else HIGH)
        for other in (module + LOW, module + HIGH):
            if other not in tensors:
                raise UserError(f"{file}: {name} has no {other}")
        if not re.fullmatch(r"\w+(\.\w+)*", module, re.ASCII):
            raise UserError(f"{file}: {ascii(module)[:80]} is not a module's name")
        if EMBEDDING.search(module):
            raise UserError(f"{file}: {module} is an embedding, whose LoRA lies otherwise and is not converted; leave it out")
        found[module] = tensors[module + LOW], tensors[module + HIGH]
    return found


def _renamed(module: str, rename: tuple[tuple[str, str], ...], file: Path) -> str:
    start, new = next(((s, n) for s, n in rename if module.startswith(s)), ("", ""))
    renamed = new + module.removeprefix(start)
    if not re.fullmatch(r"\w+(\.\w+)*", renamed, re.ASCII):
        raise UserError(f"{file}: renamed, {module} would be {ascii(renamed)[:80]}, which is not a module's name")
    return renamed


def _pair(module: str, a: Tensor, b: Tensor, enabled: Sequence[bool] | None, fused: bool, file: Path) -> Pair:
    """A pair as it is, or a MergedLinear's as one pair: A's rows for each part, B's blocks where the parts lie."""
    where = f"{file}: {module}"
    if a.dim() != 2 or b.dim() != 2 or not a.dtype == b.dtype or not a.is_floating_point() or not (a.numel() and b.numel()):
        raise UserError(f"{where}: lora_A {tuple(a.shape)} {str(a.dtype)[6:]} and lora_B {tuple(b.shape)} {str(b.dtype)[6:]} "
                        "must be two matrices of one floating-point type")
    parts, rest = divmod(a.shape[0], b.shape[1])
    if rest or not parts or b.shape[0] % parts:
        raise UserError(f"{where}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit: lora_A must be (r, d_in) and "
                        "lora_B (d_out, r), or r times and d_out times the trained parts of a fused weight")
    if enabled is None:
        if parts == 1 and not (fused and b.shape[0] <= a.shape[1]):
            return Pair(a, b)
        seen = f"{parts} trained parts" if parts > 1 else "perhaps one trained part"
        hint = "" if fused else ", and fused so that it is found in this module's name"
        raise UserError(f"{where}: a fused weight with {seen}, and the file does not say which; give enable_lora as in "
                        f"training, for example 1,0,1 for q and v of q, k, v (1 for a plain linear){hint}")
    if sum(enabled) != parts:
        raise UserError(f"{where}: has {parts} trained parts, enable_lora {','.join(str(int(e)) for e in enabled)} "
                        f"says {sum(enabled)}")
    rank, width = b.shape[1], b.shape[0] // parts
    blocks = b.new_zeros(width * len(enabled), rank * parts)
    for g, part in enumerate(i for i, on in enumerate(enabled) if on):
        blocks[part * width:(part + 1) * width, g * rank:(g + 1) * rank] = b[g * width:(g + 1) * width]
    return Pair(a, blocks, parts)


def _peft_tensors(pairs: dict[str, Pair]) -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {f"{prefix}{m}.{key}.weight": t for m, p in pairs.items() for key, t in (("lora_A", p.a), ("lora_B", p.b))}


def _peft_config(pairs: dict[str, Pair], alpha: float, base: str | None) -> dict:
    """Modules by their full names: a suffix could name modules that the file has no tensors for."""
    def plain(number: float) -> float | int:
        return int(number) if float(number).is_integer() else number

    def most(values: Iterable) -> object:
        return Counter(values).most_common(1)[0][0]
    ranks = {m: p.rank for m, p in pairs.items()}
    alphas = {m: plain(alpha * p.parts) for m, p in pairs.items()}
    r, a = most(ranks.values()), most(alphas.values())
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": base, "bias": "none",
              "r": r, "lora_alpha": a, "lora_dropout": 0.0, "use_rslora": False, "target_modules": sorted(pairs),
              "fan_in_fan_out": {m.rpartition(".")[2] in CONV1D for m in pairs} == {True}}
    patterns = {"rank_pattern": {re.escape(m): n for m, n in ranks.items() if n != r},
                "alpha_pattern": {re.escape(m): n for m, n in alphas.items() if n != a}}
    return config | {key: found for key, found in patterns.items() if found}

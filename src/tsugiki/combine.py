"""Several adapters made into one LoRA, and an adapter of any method turned into one: arithmetic on the changes of weights."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Adapter, Adapters
from .edit import LINEARS
from .errors import UserError, nearest
from .merge import fold
from .methods.lora import LoRA, LoRAEdit
from .sites import Site, shortest
from .weights import dense, unmerged

HOWS = ("linear", "svd", "cat", "ties", "dare", "dare_ties", "magnitude")
PRUNING = ("ties", "dare", "dare_ties", "magnitude")  # those that take a density
Factors = tuple[Tensor, Tensor]                       # B (out, r), A (r, in): the change is B A
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Combined:
    """A new LoRA and how far it is from what was asked: ||dW - B A|| / ||dW|| in the Frobenius norm, B and A as stored."""
    adapter: Adapter
    rank: int
    error: float                                      # over all sites
    sites: dict[str, float]                           # site name -> its own


@torch.no_grad()
def combine(home: Adapters, new: str, names: Mapping[str, float] | Sequence[str] | str, how: str = "linear",
            rank: int | None = None, density: float | None = None, seed: int = 0) -> Combined:
    """Add a LoRA `new` whose change of the base's weights is made from those of the named adapters; a list weighs each with 1.

    dW_i is what adapter i alone changes on the frozen weights, in float64; B A is the best approximation of dW of that rank
    (truncated SVD, each factor with the roots of the singular values), without a rank as many as dW has. How dW is made:
      linear     sum of w_i dW_i; "svd" is the same where a rank must be given
      cat        the same sum, the factors of LoRA-type adapters side by side: no SVD, the rank is the sum of theirs
      magnitude  linear, after keeping the `density` largest numbers of each dW_i
      dare       linear, after keeping each number with probability `density` and dividing by it (arXiv:2311.03099,
                 equations 2 and 3); the draw belongs to (seed, adapter, site)
      ties       trimmed as in magnitude; per number the sign of the sum is elected, and w_i dW_i averaged over the
                 adapters that have it (arXiv:2306.01708, section 3.2; the election is unweighted, as in Hugging Face PEFT)
      dare_ties  ties, dropped as in dare instead of trimmed
    A site that only some adapters have counts as zero for the others. Trimming is per site. Changes of biases are mixed alike
    and become the LoRA's own bias, exactly.
    Raises UserError, and adds nothing, for wrong settings and for an adapter that is not a change of linear weights.
    """
    weights = _weights(names)
    check(how, rank, density)
    home.check_name(new)
    sources = [home.get(name) for name in weights]
    made: dict[str, Factors] = {}
    offsets: dict[str, Tensor] = {}                   # the changes of biases, where there are any
    errors: dict[str, tuple[float, float]] = {}       # site name -> (||dW - B A||, ||dW||)
    for site, deltas in _changes(sources):
        target, offset = (_mixed([_pruned(part, how, density, f"{seed} {source.name} {site.name}{what}")
                                  for source, part in zip(sources, parts, strict=True)], list(weights.values()),
                                 elect=how in ("ties", "dare_ties"))
                          for what, parts in (("", [dw for dw, _ in deltas]), (" bias", _offsets(site, deltas))))
        if offset.any():
            offsets[site.name] = offset
        if not target.isfinite().all():
            raise UserError(f"{new}: the change at {site.name} is not finite")
        factors = None if how in PRUNING else _low_rank(sources, weights, site)
        if how == "cat" and factors is None:
            who = next(s for s in sources if _low_rank([s], weights, site) is None)
            raise UserError(f'cat: adapter {who.name!r} ({who.cfg.name}) has no factors to put side by side; use how="linear"')
        floor = EPS * sum(map(abs, weights.values())) * float(dense(site.exit, unmerged(site.exit)[0]).double().norm())
        b, a = factors if how == "cat" else _truncated(target if factors is None else factors, rank, floor)
        b, a = b.to(home._dtype()), a.to(home._dtype())
        made[site.name] = b, a
        errors[site.name] = float((target - b.double() @ a.double()).norm()), float(target.norm())
    adapter = _lora(home, new, made, offsets, rank, seed)
    off, size = (math.sqrt(sum(e[i] ** 2 for e in errors.values())) for i in (0, 1))
    return Combined(adapter, adapter.cfg.rank, _ratio(off, size), {name: _ratio(*e) for name, e in errors.items()})


def convert(home: Adapters, name: str, new: str, rank: int | None = None) -> Combined:
    """Add a LoRA `new` with the change of weights of adapter `name`: exact without a rank, the best one of that rank with."""
    return combine(home, new, {name: 1.0}, rank=rank)


@torch.no_grad()
def change(adapter: Adapter) -> Iterator[tuple[Site, Tensor, Tensor | None]]:
    """What an adapter changes on the frozen weights, one site at a time: (site, dW (out, in), db (out,) or None), float64.

    Sites are linears or parts of fused ones; whatever else is merged into the base does not count.
    Raises UserError for a method that is no change of weights, or not of a linear's.
    """
    for site, [(dw, db)] in _changes([adapter]):
        yield site, dw, db


def _weights(names: Mapping[str, float] | Sequence[str] | str) -> dict[str, float]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Mapping):
        if twice := [n for i, n in enumerate(names) if n in names[:i]]:
            raise UserError(f"combine: adapter {twice[0]!r} is named twice; give weights as {{{twice[0]!r}: 2.0}}")
        names = dict.fromkeys(names, 1.0)
    for name, weight in names.items():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(f"combine: the weight of {name!r} must be a number, got {weight!r}")
    if not names:
        raise UserError("combine: no adapter is named")
    return dict(names)


def check(how: str, rank: int | None, density: float | None) -> None:
    """Raises UserError for settings that do not fit each other."""
    if how not in HOWS:
        raise UserError(f"combine: how {how!r} is not known{nearest(str(how), HOWS)} (known: {' '.join(HOWS)})")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"combine: rank must be a whole number from 1 up, got {rank!r}")
    if how == "svd" and rank is None:
        raise UserError('combine: svd needs a rank; how="linear" takes as many as the change has')
    if how == "cat" and rank is not None:
        raise UserError('combine: cat keeps every factor, so it takes no rank; use how="svd"')
    if how in PRUNING and (type(density) not in (int, float) or not 0 < density <= 1):
        raise UserError(f"combine: {how} needs a density, the share of numbers it keeps, above 0 and at most 1; got {density!r}")
    if how not in PRUNING and density is not None:
        raise UserError(f"combine: {how} takes no density (these do: {' '.join(PRUNING)})")


# What adapters change, site by site

def _changes(sources: Sequence[Adapter]) -> Iterator[tuple[Site, list[tuple[Tensor, Tensor | None]]]]:
    """Every site that one of them changes, with each one's (dW, db) there; one module's matrices at a time."""
    for module, places in _places(sources).items():
        whole = [_moved(source, module) for source in sources]
        for site in places:
            rows = slice(None) if site.features is None else site.features.to(whole[0][0].device)
            yield site, [(dw[rows], None if db is None else db[rows]) for dw, db in whole]


def _places(sources: Sequence[Adapter]) -> dict[nn.Module, list[Site]]:
    """Per changed module, in order of sites: the whole linear, if any adapter changes it as a whole, else its changed parts."""
    home, wanted = sources[0].home, set()
    linears = [s for s in home.sites if s.role in LINEARS]
    for source in sources:
        if not source.mergeable:
            raise UserError(f"{source.cfg.name} is not a change of weights: adapter {source.name!r} cannot become a LoRA")
        for place in source.sites:
            same = next((s for s in linears if s.exit is place.exit and _same_rows(s, place)), None)
            if same is None:
                raise UserError(f"adapter {source.name!r} ({source.cfg.name}) changes {place.name}, which is no linear: "
                                "its weight is not a matrix that a LoRA could change")
            wanted.add(same.name)
    found: dict[nn.Module, list[Site]] = {}
    for site in linears:
        if site.name in wanted:
            found.setdefault(site.exit, []).append(site)
    # one number of a fused weight must be one number for all, so a part joins the whole
    return {module: [s for s in at if s.features is None] or at for module, at in found.items()}


def _same_rows(a: Site, b: Site) -> bool:
    return a.features is b.features or a.features is not None and b.features is not None and torch.equal(a.features, b.features)


def _moved(source: Adapter, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(dW, db) of all its edits on a module, folded in their order into the weight from before any merge."""
    w0, b0 = unmerged(module)
    w0, b0 = dense(module, w0).double(), None if b0 is None else b0.double()
    w, b = fold([pair for pair in source.edits.values() if pair[0].exit is module], w0, b0)
    return w - w0, b if b is None or b0 is None else b - b0


def _offsets(site: Site, deltas: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Each source's change of the bias, zero where it has none."""
    return [dw.new_zeros(site.d_out) if db is None else db for dw, db in deltas]


# How changes are mixed

def _pruned(dw: Tensor, how: str, density: float | None, key: str) -> Tensor:
    if how in ("ties", "magnitude"):
        flat, keep = dw.reshape(-1), int(density * dw.numel())
        kept = torch.zeros_like(flat)
        at = flat.abs().topk(keep, sorted=False).indices
        kept[at] = flat[at]
        return kept.view_as(dw)
    if how in ("dare", "dare_ties"):
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little"))
        stays = torch.rand(dw.shape, generator=generator) < density           # on the CPU: the same draw on every device
        return torch.where(stays.to(dw.device), dw / density, 0.0)
    return dw


def _mixed(deltas: list[Tensor], weights: list[float], elect: bool) -> Tensor:
    if not elect:
        return sum(w * d for w, d in zip(weights, deltas, strict=True))
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [d.sign() == sign for d in deltas]                                # a number that was dropped agrees with none
    total = sum(w * d * ok for w, d, ok in zip(weights, deltas, agree, strict=True))
    return total / sum(ok.double() for ok in agree).clamp_min(1.0)


# Factors

def _low_rank(sources: Sequence[Adapter], weights: Mapping[str, float], site: Site) -> Factors | None:
    """The weighted sum as LoRA's own factors side by side, if every change at the site is just B A."""
    found = []
    for source in sources:
        for place, edit in source.edits.values():
            if place.exit is not site.exit or site.features is not None and not _same_rows(place, site):
                continue
            if (type(edit).merge, type(edit).merge_input) != (LoRAEdit.merge, LoRAEdit.merge_input):
                return None
            b = weights[source.name] * edit.scale * edit.B.double()
            if place.features is not None and site.features is None:          # a part joins the whole
                b = b.new_zeros(site.d_out, b.shape[1]).index_copy(0, place.features.to(b.device), b)
            found.append((b, edit.A.double()))
    return torch.cat([b for b, _ in found], 1), torch.cat([a for _, a in found])


def _truncated(change: Tensor | Factors, rank: int | None, floor: float) -> Factors:
    """The best B A of at most `rank` (Eckart-Young), with balanced factors; singular values of rounding's size are left out.

    Factors are not multiplied out: B = Qb Rb, A = Ra' Qa', and the SVD is of the small Rb Ra'.
    """
    if isinstance(change, Tensor):
        u, s, vh = _narrow_svd(change, floor) or torch.linalg.svd(change, full_matrices=False)
        floor += EPS * max(change.shape) * float(s[0])
    else:
        (qb, rb), (qa, ra) = torch.linalg.qr(change[0]), torch.linalg.qr(change[1].T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        u, vh, floor = qb @ u, vh @ qa.T, EPS * max(len(qb), len(qa)) * float(s[0])
    keep = min(int((s > floor).sum()), rank or len(s))
    root = s[:keep].sqrt()
    return u[:, :keep] * root, root[:, None] * vh[:keep]


def _narrow_svd(change: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The SVD of a matrix of low rank, many times faster; None if what it misses is more than rounding.

    Random combinations of its columns span all of them if there are as many as its rank (Halko et al. 2011, arXiv:0909.4061).
    """
    width = min(change.shape) // 8
    if not width:
        return None
    mixing = torch.randn(change.shape[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(change @ mixing.to(change.device))[0]                 # (out, width)
    rest = q.T @ change
    u, s, vh = torch.linalg.svd(rest, full_matrices=False)
    missed = float((change - q @ rest).norm())
    return (q @ u, s, vh) if missed <= floor + EPS * max(change.shape) * float(s[0]) else None


def _lora(home: Adapters, new: str, made: Mapping[str, Factors], offsets: Mapping[str, Tensor], rank: int | None,
          seed: int) -> Adapter:
    """A LoRA of these factors, with a bias if there are offsets.

    Where a site needs less than the rank, the rest is as in a new LoRA: no effect, but trainable.
    """
    rank = rank or max(1, *(len(a) for _, a in made.values()))
    cfg = LoRA(rank=rank, alpha=float(rank), bias=bool(offsets), targets=shortest(home.sites, set(made)))
    adapter = home.add(new, cfg, seed=seed)
    for site, edit in adapter.edits.values():
        b, a = made[site.name]
        edit.B[:, :b.shape[1]], edit.A[:len(a)] = b, a
        if site.name in offsets:
            edit.b.copy_(offsets[site.name])
    return adapter


def _ratio(off: float, size: float) -> float:
    return off / size if size else 0.0

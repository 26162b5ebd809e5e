"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA whose A starts as the directions in which the inputs vary most."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import Config, Edit, Start, setting
from ..route import Context
from ..sites import Site
from .lora import LoRA, LoRAEdit

ROWS = 128                                            # inputs of at most this width are decomposed without truncation


class Inputs:
    """The inputs of a site as their largest right singular vectors, updated as they come (section 3.2).

    They are taken in groups of a fixed number of rows, so that how they are cut into batches changes nothing. Once the
    first `components` directions all turn by less than an angle of cosine `tau` in a group, the rest is not looked at.
    """

    def __init__(self, components: int, tau: float):
        self.components, self.tau, self.done = components, tau, False
        self.keep = max(ROWS, 4 * components)         # more than are asked for: what truncation loses is then small
        self.waiting: list[Tensor] = []
        self.factor: Tensor | None = None             # (<= keep, d_in) float64: S V^T of everything folded so far
        self.total = 0.0                              # sum of squares of everything folded

    def see(self, rows: Tensor) -> None:
        if self.done or not len(rows):
            return
        self.waiting.append(rows.double())
        if sum(map(len, self.waiting)) >= self.keep:
            whole = torch.cat(self.waiting)
            full = len(whole) // self.keep * self.keep
            for group in whole[:full].split(self.keep):
                self._fold(group)
                if self.done:
                    break
            self.waiting = [whole[full:]] if full < len(whole) and not self.done else []

    def _fold(self, group: Tensor) -> None:
        """The SVD of what is known and the group, by the eigenvectors of its smaller product with itself."""
        old, c = self.factor, self.components
        m = group if old is None else torch.cat([old, group])
        if len(m) <= m.shape[1]:
            rows = torch.linalg.eigh(m @ m.T)[1].flip(1).T @ m
        else:
            values, vectors = torch.linalg.eigh(m.T @ m)
            rows = (values.clamp_min(0).sqrt() * vectors).flip(1).T
        self.factor = rows[:self.keep]
        self.total += float(group.square().sum())
        if old is not None and len(old) >= c:
            self.done = bool((F.cosine_similarity(self.factor[:c], old[:c]).abs() > self.tau).all())

    def directions(self, most: int) -> tuple[Tensor, Tensor]:
        """(V^T (n, d_in), share of all variance (n,)) of the n <= most largest directions that are not 0."""
        if self.waiting:
            self._fold(torch.cat(self.waiting))
            self.waiting = []
        s = self.factor.norm(dim=1)
        n = min(most, int((s > s[0] * 1e-7).sum()))
        return self.factor[:n] / s[:n, None], s[:n].square() / max(self.total, 1e-300)


class EVAEdit(LoRAEdit):
    """LoRA's; while the data are looked at, its inputs are collected."""
    look: Callable[[EVAEdit, Tensor, Context], None] | None = None

    def __init__(self, config: EVA, site: Site, start: Start):
        super().__init__(config, site, start)
        self.d_in = site.d_in

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if self.look is not None:
            self.look(self, x.detach(), ctx)
        return super().post(x, y, ctx)

    def begin(self, a: Tensor, scale: float) -> None:
        """A (rank, d_in) in place of the random one, and a B of zeros of its rank."""
        if a.shape == self.A.shape:
            with torch.no_grad():
                self.A.copy_(a)
        else:
            self.A = nn.Parameter(a.to(self.A, copy=True))        # several sites begin from one
            self.B = nn.Parameter(self.B.new_zeros(len(self.B), len(a)))
        self.scale = scale


class Look:
    """Collects the inputs of edits, once for sites that read the same tensor (a query's, key's and value's)."""

    def __init__(self, components: dict[EVAEdit, int], tau: float):
        self.components, self.tau = components, tau
        self.inputs: dict[EVAEdit, Inputs] = {}
        self.last: tuple[Tensor, EVAEdit] | None = None

    def __call__(self, edit: EVAEdit, x: Tensor, ctx: Context) -> None:
        same = self.last is not None and self.last[0].data_ptr() == x.data_ptr() and (
            self.last[0].shape, self.last[0].stride()) == (x.shape, x.stride())
        mine = self.inputs.get(self.last[1]) if same else None
        if mine is None or self.inputs.setdefault(edit, mine) is not mine:
            if edit not in self.inputs:
                self.inputs[edit] = Inputs(self.components[edit], self.tau)
            mask = None if ctx.mask is None or ctx.mask.dim() != 2 else ctx.mask[:, -x.shape[1]:].bool()
            self.inputs[edit].see(x.reshape(-1, x.shape[-1]) if mask is None else x[mask.to(x.device)])
            self.last = x, edit


def spread(shares: Sequence[Tensor], budget: int) -> list[int]:
    """How many of its directions each site gets: the `budget` largest shares of variance (section 3.3), one a site at least."""
    counts = [min(1, len(s)) for s in shares]
    rest = sorted(((-float(v), i, j) for i, s in enumerate(shares) for j, v in enumerate(s) if j))
    for _, i, _ in rest[:max(0, budget - sum(counts))]:
        counts[i] += 1
    return counts


@dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    """EVA. Trains about rank * (d_in + d_out) numbers a site, the ranks shared out by the data.

    Before the first step the rows of the first steps are looked at. A becomes the inputs' largest right singular vectors,
    and the ranks move to the sites whose few directions explain most. B starts at zero, so nothing changes.

    An adapter that is trained already stays as it is. Stored as a LoRA with ranks of its own.
    """
    rho: float = setting(2.0, "a site's rank grows to at most rho * rank; 1: every site keeps `rank`", low=1.0)
    tau: float = setting(0.99, "cosine of the turn at which a site is looked at no more; 1: all rows are", low=0.0, high=1.0)

    name: ClassVar[str] = "eva"
    edit: ClassVar[type[Edit]] = EVAEdit
    lr: ClassVar[float] = 2e-4
    small_lr: ClassVar[float] = 2e-3

    @torch.no_grad()
    def prepare(self, adapter: Any, forward: Callable[[], Any]) -> None:
        edits = [edit for _, edit in adapter.edits.values()]
        if any(bool(edit.B.count_nonzero()) for edit in edits):
            return
        most = {edit: round(len(edit.A) * self.rho) for edit in edits}
        look = Look(most, self.tau)
        for edit in edits:
            edit.look = look
        try:
            forward()
        finally:
            for edit in edits:
                edit.look = None
        found: dict[Inputs, tuple[Tensor, Tensor]] = {}
        seen = [e for e in edits if e in look.inputs and (look.inputs[e].waiting or look.inputs[e].factor is not None)]
        for edit in seen:
            inputs = look.inputs[edit]
            if inputs not in found:
                found[inputs] = inputs.directions(max(most[e] for e in seen if look.inputs[e] is inputs))
        shares = [found[look.inputs[edit]][1][:most[edit]] for edit in seen]
        for edit, rank in zip(seen, spread(shares, sum(len(edit.A) for edit in seen)), strict=True):
            if rank:
                edit.begin(found[look.inputs[edit]][0][:rank], edit.scale)
        cfg = self.stored(adapter)[0]                 # the exact scales that whoever reads the stored ranks will compute
        for site, edit in adapter.edits.values():
            edit.scale = cfg.scale_at(site)

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        """With the ranks that the data gave, and alphas that keep every site's scale (as PEFT's EVA keeps it)."""
        ranks = {s.name: len(edit.A) for s, edit in adapter.edits.values()}
        if all(rank == self.rank_at(s) for s, rank in zip(adapter.sites, ranks.values(), strict=True)):
            return super().stored(adapter)
        root = 0.5 if self.rslora else 1.0
        alphas = {s.name: self.scale_at(s) * ranks[s.name] ** root for s in adapter.sites}
        return replace(self, ranks={n: r for n, r in ranks.items() if r != self.rank} or None,
                       alphas={n: a for n, a in alphas.items() if a != self.alpha} or None), adapter.tensors()

"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): a change in the form of an SVD whose least important triplets are pruned."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..errors import UserError
from ..formats.spec import Peft
from ..route import Context, dropout
from ..sites import Site
from .lora import LoRA

STEPS = 1000                                          # PEFT's files need a number of steps; ours know shares of a run


class AdaLoRAEdit(Edit):
    """y + s * B (E * (A drop(x))): P, Lambda and Q of equation 3. s = alpha / first rank, whatever is pruned later."""

    def __init__(self, config: AdaLoRA, site: Site, start: Start):
        super().__init__(config, site, start)
        rank = (config.ranks or {}).get(site.name, config.rank)
        self.A = start.parameter(f"{site.name}.A", rank, site.d_in, fill=_normal)
        self.E = start.parameter(f"{site.name}.E", rank, 1)
        self.B = start.parameter(f"{site.name}.B", site.d_out, rank, fill=_normal)
        self.scale, self.p = config.alpha / (config.rank + 1e-5), config.dropout       # 1e-5: as PEFT has it

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        x = dropout(x, self.p, ctx, self.salt, self.training)
        low = F.linear(x, (self.A * self.E).to(x.dtype))                      # (B, T, rank)
        return y + (F.linear(low, self.B.to(x.dtype)) * self.scale).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * (self.B.to(w) @ (self.A.to(w) * self.E.to(w))), b

    def remember(self) -> None:
        """Make the buffers that the schedule keeps; an adapter that only computes needs none."""
        if "kept" not in self._buffers:
            self.register_buffer("kept", torch.ones_like(self.E))             # 0 where a triplet is pruned
            for name in "AEB":
                for kind in ("sensitivity", "uncertainty"):
                    self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name)))

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |w * gradient| and how much it varies, into the buffers (equations 8 to 10)."""
        for name in "AEB":
            p, mean = getattr(self, name), self._buffers[f"sensitivity_{name}"]
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            mean.mul_(beta1).add_((1 - beta1) * now)
            self._buffers[f"uncertainty_{name}"].mul_(beta2).add_((1 - beta2) * (now - mean).abs())

    def importance(self) -> Tensor:
        """Of each triplet, (rank,): its value's score and the means of its vectors' (equation 7)."""
        score = {n: self._buffers[f"sensitivity_{n}"] * self._buffers[f"uncertainty_{n}"] for n in "AEB"}
        return score["E"].view(-1) + (score["A"].mean(1) + score["B"].mean(0))

    @torch.no_grad()
    def prune(self) -> None:
        self.E.masked_fill_(self.kept == 0, 0.0)


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 0.02, generator=generator)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Config):
    """AdaLoRA. Trains rank * (d_in + d_out + 1) numbers a site, and prunes to `target` triplets a site on average.

    Schedule (section 3.3), in shares of the run: nothing is pruned in the first `tinit`; then the budget falls as a cubic;
    the last `tfinal` trains what is left. E starts at zero, so a new adapter changes nothing. Equal to PEFT's step by step.
    """
    rank: int = setting(12, "triplets of every site at the start", low=1)
    target: int | None = setting(None, "mean triplets of a site at the end (default: two thirds of rank)", low=1)
    alpha: float = setting(16.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    dropout: float = setting(0.0, "share of inputs dropped in training", low=0.0, below=1.0)
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")
    tinit: float = setting(0.1, "share of the steps before anything is pruned", low=0.0, below=1.0)
    tfinal: float = setting(0.2, "share of the steps that train what is left", low=0.0, below=1.0)
    every: int = setting(1, "steps between two prunings", low=1)
    beta1: float = setting(0.85, "smoothing of the importance", low=0.0, below=1.0)
    beta2: float = setting(0.85, "smoothing of its uncertainty", low=0.0, below=1.0)
    orthogonality: float = setting(0.5, "weight of the penalty that keeps A and B orthogonal", low=0.0)
    ranks: dict[str, int] | None = setting(None, "triplets that pruning has left: name of a site -> rank")

    name: ClassVar[str] = "adalora"
    edit: ClassVar[type[Edit]] = AdaLoRAEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 8e-3
    peft: ClassVar[Peft] = Peft(
        "ADALORA", size="init_r",
        fields={"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "every": "deltaT", "beta1": "beta1",
                "beta2": "beta2", "orthogonality": "orth_reg_weight"},
        tensors={"A": "lora_A", "E": "lora_E", "B": "lora_B"},
        known=frozenset({"target_modules", "fan_in_fan_out", "r", "target_r", "tinit", "tfinal", "total_step", "rank_pattern",
                         "use_rslora", "eva_config"}),                        # the last two say nothing to AdaLoRA
        neutral=LoRA.peft.neutral | {"init_lora_weights": (True, False), "lora_bias": (False, None), "alpha_pattern": ({}, None)},
        write=lambda adapter, names: _write(adapter), read=lambda config, targets: _read(config))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.target > self.rank:
            raise UserError(f"{self.name}: target must be at most rank, {self.rank}, got {self.target}")
        if self.tinit + self.tfinal >= 1:
            raise UserError(f"{self.name}: tinit + tfinal must be below 1, or nothing is pruned, got {self.tinit} + {self.tfinal}")
        for name, rank in (self.ranks or {}).items():
            if not 0 <= rank <= self.rank:            # PEFT's files may leave a site nothing
                raise UserError(f"{self.name}: ranks: {name} must be 0 to {self.rank}, got {rank}")
        object.__setattr__(self, "ranks", self.ranks or None)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        if lost := sorted((self.ranks or {}).keys() - {s.name for s in sites}):
            raise UserError(f"{self.name}: ranks: {lost[0]!r} is no targeted site; a name here: {sites[0].name}")
        return sites

    @property
    def goal(self) -> int:
        return self.target or max(1, self.rank * 2 // 3)

    def budget(self, step: int, start: int, end: int, steps: int) -> int | None:
        """Triplets to keep of `start` after step number `step`, `end` at last; None: nothing is pruned now (equation 12)."""
        tinit, tfinal = round(self.tinit * steps), round(self.tfinal * steps)
        if step == steps - tfinal:
            return end
        if step <= tinit or step > steps - tfinal or step % self.every:
            return None
        return int((start - end) * (1 - (step - tinit) / (steps - tfinal - tinit)) ** 3 + end)

    def prepare(self, adapter: Any, forward: Callable[[], Any]) -> None:
        for _, edit in adapter.edits.values():
            edit.remember()

    def penalty(self, adapter: Any) -> Tensor | None:
        """Mean over all A and B of ||P^T P - I|| (equation 4; not squared, as the authors' code and PEFT have it)."""
        if not self.orthogonality:
            return None
        norms = []
        for _, edit in adapter.edits.values():
            eye = torch.eye(len(edit.A), dtype=edit.A.dtype, device=edit.A.device)
            norms += [(edit.A @ edit.A.T - eye).norm(), (edit.B.T @ edit.B - eye).norm()]
        return self.orthogonality * torch.stack([n.to(norms[0].device) for n in norms]).mean()

    @torch.no_grad()
    def after_step(self, adapter: Any, step: int, steps: int) -> None:
        edits = [edit for _, edit in adapter.edits.values()]
        last = steps - round(self.tfinal * steps)
        for edit in edits:
            edit.remember()
            if step < last:
                edit.observe(self.beta1, self.beta2)
            elif step > last:
                edit.prune()
        start = sum(len(edit.A) for edit in edits)
        budget = self.budget(step, start, min(start, self.goal * len(edits)), steps)
        if budget is None or budget >= start:
            return
        scores = [edit.importance().cpu() for edit in edits]
        limit = torch.cat(scores).kthvalue(start - budget).values
        for edit, score in zip(edits, scores, strict=True):
            edit.kept.copy_((score > limit)[:, None])
            edit.prune()

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        """Without the schedule's memory and the pruned triplets, whose E is 0. A site keeps one at least: files hold no empty
        tensors."""
        tensors, ranks = {}, {}
        for name, (_, edit) in adapter.edits.items():
            a, e, b = edit.A.detach(), edit.E.detach(), edit.B.detach()
            if "kept" in edit._buffers and len(e):
                at = ((edit.kept != 0) | (e != 0)).view(-1).nonzero().view(-1)
                at = at if len(at) else at.new_zeros(1)
                a, e, b = a[at], e[at], b[:, at]
            elif not len(e):
                a, e, b = a.new_zeros(1, a.shape[1]), e.new_zeros(1, 1), b.new_zeros(len(b), 1)
            tensors |= {f"{name}.A": a, f"{name}.E": e, f"{name}.B": b}
            if len(e) != self.rank:
                ranks[name] = len(e)
        return replace(self, ranks=ranks or None), tensors


def _write(adapter: Any) -> dict[str, Any]:
    """PEFT's rank_pattern is a mask of each site's first triplets; ours are the ones that are left."""
    cfg = adapter.cfg.stored(adapter)[0]
    masks = {f"{name}.lora_E": [i < rank for i in range(cfg.rank)] for name, rank in (cfg.ranks or {}).items()}
    return {"target_r": cfg.goal, "tinit": round(cfg.tinit * STEPS), "tfinal": round(cfg.tfinal * STEPS), "total_step": STEPS,
            "rank_pattern": masks or None}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    steps, masks = config.get("total_step") or STEPS, config.get("rank_pattern") or {}
    ranks = {key.removesuffix(".lora_E"): sum(map(bool, mask)) for key, mask in masks.items()}
    return {"target": min(config.get("target_r", 8), config["init_r"]), "tinit": (config.get("tinit") or 0) / steps,
            "tfinal": (config.get("tfinal") or 0) / steps, "ranks": {k: r for k, r in ranks.items() if r != config["init_r"]}}

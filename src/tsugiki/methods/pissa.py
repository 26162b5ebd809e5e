"""PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Buyukakyuz 2024, arXiv:2406.01775): LoRA that starts from the weight."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Frozen, Start, linear, times
from ..errors import UserError
from ..route import Context, dropout
from ..sites import Site
from .lora import LoRA, LoRAEdit


class WeightStartEdit(LoRAEdit):
    """y + s (B A - B0 A0) drop(x). The papers subtract s B0 A0 from the base's weight; here the base keeps its bits."""

    def __init__(self, config: PiSSA | OLoRA, site: Site, start: Start):
        super().__init__(config, site, start)
        rank = len(self.A)
        if rank > min(site.d_in, site.d_out):
            raise UserError(f"{config.name}: rank {rank} is more than {site.name} has, {min(site.d_in, site.d_out)}")
        if start.device.type != "meta":               # where only shapes are asked for there is no weight to start from
            with torch.no_grad():
                a, b = self.first(Frozen(site).weight().detach().to(start.dtype), rank)
                self.A.copy_(a)
                self.B.copy_(b)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def first(self, w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) from the weight (d_out, d_in)."""
        raise NotImplementedError

    alike = LoRAEdit.alike

    def change(self, x: Tensor, ctx: Context) -> Tensor:
        """Two products of the same form, so that equal factors give exactly 0."""
        x = dropout(x, self.p, ctx, self.salt, self.training)
        new, old = (linear(times(linear(x, a.to(x.dtype)), self.scale), b.to(x.dtype))
                    for a, b in ((self.A, self.B), (self.A0, self.B0)))
        return new - old

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * (self.B.to(w) @ self.A.to(w) - self.B0.to(w) @ self.A0.to(w)), b


class PiSSAEdit(WeightStartEdit):
    """s B0 A0 is the weight's best approximation of this rank: A = S^1/2 V^T, B = U S^1/2, S / s (equations 2 and 3)."""

    def first(self, w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = (s[:rank] / self.scale).sqrt()
        return root[:, None] * vh[:rank], u[:, :rank] * root


class OLoRAEdit(WeightStartEdit):
    """B and A are the first columns of Q and rows of R of the weight's QR decomposition (algorithm 1)."""

    def first(self, w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(w)
        return r[:rank], q[:, :rank]


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """PiSSA. Trains what LoRA trains, from the weight's largest singular directions. Stored as a LoRA of twice the rank."""
    bias: ClassVar[bool] = False
    start: ClassVar[str] = "kaiming"                  # replaced by the weight's

    name: ClassVar[str] = "pissa"
    edit: ClassVar[type[Edit]] = PiSSAEdit
    lr: ClassVar[float] = 2e-5
    small_lr: ClassVar[float] = 1e-3

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        """[B, -B0] [A; A0]: the same function as a plain LoRA, which needs neither the method nor its start to be read."""
        cfg = super().stored(adapter)[0]
        values = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in {g.name for g in fields(LoRA)}}
        by = math.sqrt(2) if self.rslora else 2       # twice the rank, the same scale
        values |= {"rank": 2 * self.rank, "alpha": by * self.alpha,
                   "ranks": cfg.ranks and {k: 2 * r for k, r in cfg.ranks.items()},
                   "alphas": cfg.alphas and {k: by * a for k, a in cfg.alphas.items()}}
        tensors = {}
        for name, (_, edit) in adapter.edits.items():
            tensors[f"{name}.A"] = torch.cat([edit.A.detach(), edit.A0])
            tensors[f"{name}.B"] = torch.cat([edit.B.detach(), -edit.B0], 1)
        return LoRA(**values), tensors


@dataclass(frozen=True, kw_only=True)
class OLoRA(PiSSA):
    """OLoRA. Trains what LoRA trains, from the weight's QR decomposition. Stored as a LoRA of twice the rank."""
    name: ClassVar[str] = "olora"
    edit: ClassVar[type[Edit]] = OLoRAEdit
    lr: ClassVar[float] = 2e-4
    small_lr: ClassVar[float] = 1e-3

"""Products of a few rows, as in decoding, with a weight that was laid out beforehand, for AMX tiles or AVX512-BF16: rows.c.

Such a product waits for the weight to come from memory. torch's lays it out anew at every call, or reads its packed copy at a
fraction of the rate that memory gives.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tsugiki.kernels.native import close, library, run

MOST = 64                                             # rows: of more, torch's own product is as quick
ALONE = 1 << 17                                       # weights from which threads pay


@dataclass(frozen=True)
class Laid:
    """A weight, (out, in) bfloat16, as tiles."""
    tiles: Tensor
    out: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) weight^T + bias (out,), at most MOST rows, all bfloat16; sums are float32."""
        width = x.shape[-1]
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.out)
        threads = torch.get_num_threads() if self.tiles.numel() >= ALONE else 1
        run("rows_product", x, self.tiles, bias, y, x.numel() // width, self.out, width, threads)
        return y


def fits(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % 32 == 0 and works()


def laid(weight: Tensor) -> Laid:
    """A copy of a weight that `fits`, filled up with zeros to a multiple of 32 rows."""
    n, k = weight.shape
    tiles = weight.new_zeros(-(-n // 32) * 32, k)
    run("rows_lay_out", weight.detach().contiguous(), tiles, n, k, torch.get_num_threads())
    return Laid(tiles, n)


@cache
def works() -> bool:
    """Whether the kernel is there, and what it makes of small numbers is as in float32."""
    if library() is None:
        return False
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=g).bfloat16() for shape in ((50, 96), (50,), (45, 96)))
    tiles = laid(weight)
    return all(close(tiles.product(x[:m], bias), x[:m].float() @ weight.float().t() + bias.float()) for m in (1, 17, 32, 45))

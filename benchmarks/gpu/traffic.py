"""What one layer of deformable attention moves between the GPU's caches, by counting; needs no GPU.

python benchmarks/gpu/traffic.py [--sigma 1 4] [--kept 0.1 0.3]

One image of 800x1333, float32, locations as at the start of training plus normal noise of sigma
pixels. Counted, in rows of 128 bytes (one token of one head):

forward: every row once per block and head: what L2 delivers if L1 keeps what a block has read.
per corner: additions to memory of the direct backward, one per corner in the map.
per block: those of the aggregated backward, every token once per block, within the windows of
kernels/csrc/cuda/aggregate.cuh; each of 32 groups may cut a run, which is included.

all sorted: the same if it sorted every level, not only those that fit its counters.

Queries are all tokens, in 8x8 tiles, or with --kept a share of them as a list in several orders, of
which modeling/selection.py:visiting_order makes one. Lists are drawn twice: "boxes", where a token's
score is how deep it lies in one of some random boxes, plus noise; and "uniform".
"""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, POINTS, ROW_BYTES = 8, 4, 128
BINS, WINDOW, TILE, GROUPS = 2048, 45, 8, 32  # of aggregate.cuh
LIST = 32  # queries of a block of the forward, where they come as a list
STARTS = [sum(h * w for h, w in LEVELS[:level]) for level in range(len(LEVELS) + 1)]


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """Level, row and column of every token, (N,) each."""
    parts = []
    for level, (h, w) in enumerate(LEVELS):
        at = torch.arange(h * w)
        parts.append(torch.stack([torch.full_like(at, level), at // w, at % w]))
    return tuple(torch.cat(parts, dim=1))


def centres() -> Tensor:
    """(N, 2) centre (x, y) of every token in [0, 1]."""
    level, row, column = grid()
    size = torch.tensor(LEVELS)[level]
    return torch.stack([(column + 0.5) / size[:, 1], (row + 0.5) / size[:, 0]], dim=-1)


def cells(
    centre: Tensor, head: int, size: tuple[int, int], sigma: float, generator: torch.Generator
) -> Tensor:
    """(Q, P, 2) column and row of the first corner of each sample on a level of `size`."""
    angle = torch.tensor(head * 2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()])
    direction = direction / direction.abs().max()
    steps = direction * torch.arange(1, POINTS + 1)[:, None]
    at = (centre * torch.tensor(size[::-1]))[:, None] - 0.5 + steps
    return (at + sigma * torch.randn(len(centre), POINTS, 2, generator=generator)).floor().long()


def corners(cell: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Column, row and whether it lies in the map, of the corners (..., 4) of cells (..., 2)."""
    x = torch.stack([cell[..., 0] + i % 2 for i in range(4)], -1)
    y = torch.stack([cell[..., 1] + i // 2 for i in range(4)], -1)
    return x, y, (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])


def rows(block: Tensor, token: Tensor, among: Tensor) -> int:
    """Different pairs of block (Q,) and token (Q, P, 4), among some corners."""
    return (block[:, None, None] * STARTS[-1] + token)[among].unique().numel()


def dense(sigma: float) -> tuple[int, int, int]:
    """Rows of a layer whose queries are all tokens: forward, per corner, per block."""
    generator, centre, (level, row, column) = torch.Generator().manual_seed(0), centres(), grid()
    forward = direct = aggregated = 0
    for own, (h, w) in enumerate(LEVELS):
        queries = level == own
        tile_y, tile_x = row[queries] // TILE, column[queries] // TILE
        across = -(-w // TILE)
        tile, tiles = tile_y * across + tile_x, across * -(-h // TILE)
        for size in LEVELS:
            high, wide = size
            for head in range(HEADS):
                x, y, valid = corners(cells(centre[queries], head, size, sigma, generator), size)
                token, every = y * wide + x, int(valid.sum())
                forward += rows(tile, token, valid)
                direct += every
                if high * wide >= BINS and high * wide > 4 * h * w:  # over twice as fine: unsorted
                    aggregated += every
                    continue
                inside = valid
                if high * wide >= BINS:
                    window_w = min(wide, WINDOW)
                    window_h = min(high, (BINS - 1) // window_w)
                    left = ((tile_x * TILE + TILE // 2) * (wide / w)).int() - window_w // 2
                    top = ((tile_y * TILE + TILE // 2) * (high / h)).int() - window_h // 2
                    left = left.clamp(0, wide - window_w)[:, None, None]
                    top = top.clamp(0, high - window_h)[:, None, None]
                    inside = valid & (x >= left) & (x < left + window_w)
                    inside &= (y >= top) & (y < top + window_h)
                outside = int((valid & ~inside).sum())
                summed = rows(tile, token, inside) + outside + (GROUPS - 1) * tiles
                aggregated += min(every, summed)
    return forward, direct, aggregated


# ------------------------------------------------------------------------------- kept tokens


def kept_tokens(kind: str, share: float, generator: torch.Generator) -> Tensor:
    """(K,) tokens, best score first."""
    count = math.ceil(STARTS[-1] * share)
    score = torch.rand(STARTS[-1], generator=generator)
    if kind == "boxes":
        centre = centres()
        depth = torch.full_like(score, -1.0)
        for _ in range(20):
            middle = torch.rand(2, generator=generator)
            half = 0.5 * torch.exp(torch.empty(2).uniform_(-3.0, -0.7, generator=generator))
            depth = torch.maximum(depth, (1 - (centre - middle).abs() / half).amin(-1).clamp(-1, 1))
        score = depth + 0.5 * score
    return score.topk(count).indices


def interleave(row: Tensor, column: Tensor) -> Tensor:
    """Morton code: the bits of row and column in turns."""
    code = torch.zeros_like(row)
    for bit in range(8):
        code |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << (2 * bit + 1)
    return code


def token_orders() -> dict[str, Tensor]:
    """(N,) keys by which a list of tokens is sorted."""
    level, row, column = grid()
    index = torch.arange(STARTS[-1])
    tile = (level * 64 + row // TILE) * 64 + column // TILE
    x, y = (centres() * 256).long().unbind(-1)
    return {
        "token index": index,
        "8x8 tiles": tile * TILE**2 + row % TILE * TILE + column % TILE,
        "Morton, per level": (level << 16) + interleave(row, column),
        "16x16 grid, all levels": (y // 16 * 16 + x // 16) * STARTS[-1] + index,  # visiting_order
        "Morton, all levels": (interleave(y, x) << 2) + level,
    }


def listed(tokens: Tensor, sigma: float) -> Iterator[tuple[str, int, int, int, int]]:
    """Order, and rows: forward, per corner, per block, and that with every level sorted."""
    generator, centre = torch.Generator().manual_seed(0), centres()[tokens]
    samples = []  # drawn once: the same for all orders
    for size in LEVELS:
        for head in range(HEADS):
            x, y, valid = corners(cells(centre, head, size, sigma, generator), size)
            samples.append((size[0] * size[1], y * size[1] + x, valid))
    orders = {name: key[tokens].argsort() for name, key in token_orders().items()}
    for name, order in {"score": torch.arange(len(tokens)), **orders}.items():
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        block = place // TILE**2
        cuts = (GROUPS - 1) * -(-len(order) // TILE**2)
        forward = direct = aggregated = sorted_all = 0
        for pixels, token, valid in samples:
            every = int(valid.sum())
            summed = min(every, rows(block, token, valid) + cuts)
            forward += rows(place // LIST, token, valid)
            direct += every
            aggregated += summed if pixels < BINS else every
            sorted_all += summed
        yield name, forward, direct, aggregated, sorted_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--kept", type=float, nargs="+", default=[], metavar="SHARE")
    args = parser.parse_args()

    def megabytes(*counts: int) -> str:
        return "  ".join(f"{count * ROW_BYTES / 1e6:8.1f}" for count in counts)

    for sigma in args.sigma:
        print(f"{f'sigma {sigma:g}, MB':44}   forward  per corner  per block  all sorted")
        if not args.kept:
            print(f"{'all tokens':44}{megabytes(*dense(sigma))}")
        for share in args.kept:
            for kind in ("boxes", "uniform"):
                tokens = kept_tokens(kind, share, torch.Generator().manual_seed(1))
                for name, *counts in listed(tokens, sigma):
                    print(f"{f'{share:.0%}, {kind}, {name}':44}{megabytes(*counts)}", flush=True)


if __name__ == "__main__":
    main()

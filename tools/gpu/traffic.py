"""How many additions to memory the backward of a dense layer makes, by counting; needs no GPU.

python tools/gpu/traffic.py [--sigma 1 4]

One image of 800x1333, locations as at the start of training plus normal noise of sigma pixels. Per
corner: every corner in the map. Per block: every token once per 8x8 tile of queries and head, with
the windows of kernels/csrc/cuda/aggregate.cuh; each of 32 groups may cut a run, which is included.
"""

import argparse
import math

import torch

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, POINTS, ROW_BYTES = 8, 4, 128
BINS, WINDOW, TILE, GROUPS = 2048, 45, 8, 32


def samples(level, head, size, sigma, generator):
    """Pixel coordinates (H * W, P, 2) on a level of `size`, of all queries of `level`."""
    (h, w), (high, wide) = level, size
    angle = torch.tensor(head * 2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()])
    direction = direction / direction.abs().max()
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    centre = torch.stack([x * wide / w, y * high / h], -1).view(-1, 1, 2) - 0.5
    steps = direction * torch.arange(1, POINTS + 1)[:, None]
    return centre + steps + sigma * torch.randn(h * w, POINTS, 2, generator=generator)


def additions(level, size, xy):
    """Per corner and per block, of one head."""
    (h, w), (high, wide) = level, size
    cell = xy.floor().long()
    x = torch.stack([cell[..., 0] + i % 2 for i in range(4)], -1)  # (H * W, P, 4)
    y = torch.stack([cell[..., 1] + i // 2 for i in range(4)], -1)
    valid = (x >= 0) & (x < wide) & (y >= 0) & (y < high)
    direct = int(valid.sum())
    if high * wide >= BINS and high * wide > 4 * h * w:  # more than twice as fine: not sorted
        return direct, direct
    across = -(-w // TILE)
    row, column = torch.arange(h * w) // w // TILE, torch.arange(h * w) % w // TILE
    inside = valid
    if high * wide >= BINS:
        window_w = min(wide, WINDOW)
        window_h = min(high, (BINS - 1) // window_w)
        left = ((column * TILE + TILE // 2) * (wide / w)).int() - window_w // 2
        top = ((row * TILE + TILE // 2) * (high / h)).int() - window_h // 2
        left = left.clamp(0, wide - window_w)[:, None, None]
        top = top.clamp(0, high - window_h)[:, None, None]
        inside = valid & (x >= left) & (x < left + window_w) & (y >= top) & (y < top + window_h)
    tile = (row * across + column)[:, None, None]
    tokens = (tile * (high * wide) + y * wide + x)[inside].unique().numel()
    outside = int((valid & ~inside).sum())
    cuts = (GROUPS - 1) * across * -(-h // TILE)
    return direct, min(direct, tokens + outside + cuts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0, 4.0])
    for sigma in parser.parse_args().sigma:
        generator, direct, aggregated = torch.Generator().manual_seed(0), 0, 0
        for level in LEVELS:
            for size in LEVELS:
                for head in range(HEADS):
                    found = additions(level, size, samples(level, head, size, sigma, generator))
                    direct, aggregated = direct + found[0], aggregated + found[1]
        print(f"sigma {sigma:g}: per corner {direct * ROW_BYTES / 1e6:.0f} MB, "
              f"per block {aggregated * ROW_BYTES / 1e6:.0f} MB ({direct / aggregated:.1f}x less)")


if __name__ == "__main__":
    main()

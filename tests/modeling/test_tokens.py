"""Layout of the token sequence, its geometry, gather and scatter."""

import torch

from sparse_detr.modeling.selection import visiting_order
from sparse_detr.modeling.tokens import (
    Tokens,
    flatten_levels,
    gather_tokens,
    level_starts,
    scatter_tokens,
    valid_sizes,
)

SHAPES = ((4, 6), (2, 3), (1, 2))


def bare_tokens(shapes, extents):
    """Tokens of the given geometry, without content or padding."""
    number = sum(h * w for h, w in shapes)
    features, mask = torch.zeros(2, number, 1), torch.zeros(2, number, dtype=torch.bool)
    return Tokens(features, features, mask, shapes, extents, has_padding=False)


def test_levels_are_concatenated_finest_first_and_row_major():
    maps = [
        torch.arange(2 * 3 * h * w).view(2, 3, h, w).float() + 1000 * i for i, (h, w) in enumerate(SHAPES)
    ]
    tokens = flatten_levels(maps)
    assert tokens.shape == (2, 24 + 6 + 2, 3)
    assert level_starts(SHAPES) == (0, 24, 30)
    # Row 1, column 2 of level 1 is token 24 + 1 * 3 + 2.
    assert torch.equal(tokens[1, 24 + 5], maps[1][1, :, 1, 2])


def test_valid_sizes_count_unpadded_columns_and_rows():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, 3:] = True
    mask[1, :, 4:] = True
    assert valid_sizes([mask])[:, 0].tolist() == [[6, 4], [4, 3]]


def test_reference_points_are_cell_centres_of_the_image_scaled_to_each_level():
    extents = torch.tensor([[[6.0, 4.0], [3.0, 2.0], [2.0, 1.0]], [[3.0, 3.0], [2.0, 1.0], [1.0, 1.0]]])
    points = bare_tokens(SHAPES, extents).reference_points
    assert points.shape == (2, 32, 3, 2)
    # Unpadded image: the centre of row 1, column 2 of level 0, the same seen from every level.
    torch.testing.assert_close(points[0, 8], torch.tensor([[2.5 / 6, 1.5 / 4]]).expand(3, 2))
    # Padded image: the same cell is further into the image (3 x 3 valid cells), and each level
    # sees it in units of its own padded map.
    centre = torch.tensor([2.5 / 3, 1.5 / 3])
    torch.testing.assert_close(points[1, 8], centre * torch.tensor([[0.5, 0.75], [2 / 3, 0.5], [0.5, 1.0]]))


def test_gather_and_scatter_touch_only_the_kept_tokens():
    x = torch.randn(2, 10, 3)
    index = torch.tensor([[3, 1, 7], [0, 9, 4]])
    rows = gather_tokens(x, index)
    assert torch.equal(rows[1, 1], x[1, 9])
    keep = torch.tensor([[True, True, False], [True, True, True]])
    y = scatter_tokens(x, index, rows + 1, keep)
    changed = (y != x).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 4], [1, 9]]
    assert torch.equal(scatter_tokens(x, index, rows), x)  # writing back what was read
    assert y.data_ptr() != x.data_ptr()


def test_scatter_sends_gradients_to_the_update_and_to_untouched_tokens_only():
    x = torch.randn(1, 5, 2, dtype=torch.double, requires_grad=True)
    update = torch.randn(1, 3, 2, dtype=torch.double, requires_grad=True)
    index, keep = torch.tensor([[4, 0, 2]]), torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda a, b: scatter_tokens(a, index, b, keep), (x, update))
    scatter_tokens(x, index, update, keep).sum().backward()
    assert x.grad[0, :, 0].tolist() == [1, 1, 0, 1, 0]
    assert update.grad[0, :, 0].tolist() == [1, 0, 1]


def test_scatter_in_place_writes_the_same_into_the_tensor_itself():
    x, update = torch.randn(2, 10, 3), torch.randn(2, 3, 3)
    index = torch.tensor([[3, 1, 7], [0, 9, 4]])
    keep = torch.tensor([[True, True, False], [True, False, True]])
    wanted = scatter_tokens(x, index, update, keep)
    found = scatter_tokens(x, index, update, keep, in_place=True)
    assert found.data_ptr() == x.data_ptr() and torch.equal(x, wanted)


def test_neighbours_in_the_image_are_visited_one_after_the_other():
    shapes = ((40, 60), (20, 30))
    sizes = torch.tensor([[60.0, 40.0], [30.0, 20.0]])
    tokens = bare_tokens(shapes, torch.stack([sizes, sizes * torch.tensor([0.7, 0.6])]))
    generator = torch.Generator().manual_seed(0)
    ranked = torch.stack([torch.randperm(3000, generator=generator)[:300] for _ in range(2)])

    def step(order):
        """Mean distance from one to the next, in cells of the finest level."""
        at = tokens.reference_points[torch.arange(2)[:, None], ranked.gather(1, order), 0]
        return (at.diff(dim=1) * torch.tensor([60.0, 40.0])).norm(dim=-1).mean()

    order = visiting_order(ranked, tokens)
    rows = torch.arange(300).expand(2, -1)
    assert torch.equal(order.sort().values, rows)
    assert step(order) < 0.25 * step(rows)
    # An order of the tokens, not of their ranks: the same from any ranking of the same tokens.
    again = ranked.flip(1)
    assert torch.equal(again.gather(1, visiting_order(again, tokens)), ranked.gather(1, order))

"""Position codes, inverse sigmoid, neck."""

import math

import pytest
import torch

from sparse_detr.modeling.layers import ChannelMapper, SinePosition, box_code, inverse_sigmoid


def test_inverse_sigmoid_is_exact_inside_and_saturates_at_eps():
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.double)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), eps=1e-3)
    torch.testing.assert_close(ends, torch.tensor([-1, -1, 1, 1]) * math.log(1000))


@pytest.mark.parametrize("offset", [-0.5, 0.0])
def test_sine_position_of_a_cell_follows_the_formula(offset):
    position = SinePosition(embed_dim=8, temperature=20.0, offset=offset)
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[:, :, 4] = True  # four valid columns
    code = position(mask, torch.tensor([[4.0, 3.0]], dtype=torch.float64)).view(3, 5, 8)
    row, column = 1, 2
    y = (row + 1 + offset) / (3 + 1e-6) * 2 * math.pi
    x = (column + 1 + offset) / (4 + 1e-6) * 2 * math.pi
    slow = 20.0 ** (2 / 4)
    expected = [
        math.sin(y),
        math.cos(y),
        math.sin(y / slow),
        math.cos(y / slow),
        math.sin(x),
        math.cos(x),
        math.sin(x / slow),
        math.cos(x / slow),
    ]
    torch.testing.assert_close(code[row, column], torch.tensor(expected, dtype=torch.float64))


def test_box_code_concatenates_coordinates_in_the_given_order():
    boxes = torch.rand(2, 3, 4)
    code, swapped = box_code(boxes, 6), box_code(boxes, 6, order=(1, 0, 2, 3))
    assert code.shape == (2, 3, 24)
    assert torch.equal(swapped[..., :6], code[..., 6:12])
    assert torch.equal(swapped[..., 12:], code[..., 12:])


def test_neck_adds_levels_from_the_last_backbone_map():
    neck = ChannelMapper(in_channels=[4, 6], embed_dim=8, num_levels=4, num_groups=2)
    maps = [torch.randn(2, 4, 9, 12), torch.randn(2, 6, 5, 6)]
    levels = neck(maps)
    assert [tuple(m.shape[-2:]) for m in levels] == [(9, 12), (5, 6), (3, 3), (2, 2)]
    assert neck.convs[2].in_channels == 6 and neck.convs[3].in_channels == 8


def test_neck_refuses_fewer_levels_than_maps():
    with pytest.raises(ValueError, match="num_levels=1 is fewer than the 2 backbone maps"):
        ChannelMapper(in_channels=[4, 6], embed_dim=8, num_levels=1)

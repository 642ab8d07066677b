"""Key-aware deformable attention: its definition, spelled out sample by sample, and its corners."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sparse_detr.kernels import ms_deform_attn
from sparse_detr.modeling import DeformableDecoderLayer, KeyAwareDeformAttn, MSDeformAttn

SHAPES = ((5, 7), (3, 4), (2, 2))
TOKENS = sum(h * w for h, w in SHAPES)
BATCH, QUERIES, WIDTH, HEADS, POINTS = 2, 6, 16, 4, 3
OPTIONS = [
    dict(key_projection=k, shared_offsets=s) for k, s in itertools.product([False, True], [False, True])
]


def layer(seed=0, cls=KeyAwareDeformAttn, **options):
    """In double precision and with every parameter drawn, so that samples spread over the maps."""
    torch.manual_seed(seed)
    attention = cls(
        embed_dim=WIDTH, num_heads=HEADS, num_levels=len(SHAPES), num_points=POINTS, **options
    ).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def inputs(boxes=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, QUERIES, WIDTH, generator=generator).double()
    value = torch.randn(BATCH, TOKENS, WIDTH, generator=generator).double()
    reference = torch.rand(BATCH, QUERIES, len(SHAPES), 4 if boxes else 2, generator=generator)
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    start = 0
    for h, w in SHAPES:
        mask[1, start : start + h * w].view(h, w)[:, w - 1] = True
        start += h * w
    return query, reference.double(), value, SHAPES, mask


def as_defined(attention, query, reference, value, shapes, mask):
    """Every query, head and sample on its own: Lite DETR, Sec. 3.4."""
    project = [attention.value_proj] + [attention.key_proj] * (attention.key_proj is not None)
    value, key = (p(value).masked_fill(mask[..., None], 0) for p in (project[0], project[-1]))
    offsets = attention.sampling_offsets(query)
    offsets = offsets.view(BATCH, QUERIES, HEADS, -1, POINTS, 2)
    starts = [0, *torch.tensor([h * w for h, w in shapes]).cumsum(0).tolist()]
    depth = WIDTH // HEADS
    rows = []
    for b, q, m in itertools.product(range(BATCH), range(QUERIES), range(HEADS)):
        channels = slice(m * depth, (m + 1) * depth)
        keys, values = [], []
        for (level, (h, w)), p in itertools.product(enumerate(shapes), range(POINTS)):
            offset = offsets[b, q, m, min(level, offsets.shape[3] - 1), p]
            at = reference[b, q, level]
            if len(at) == 2:
                at = at + offset / torch.tensor([w, h])
            else:
                at = at[:2] + offset / POINTS * at[2:] * 0.5
            for source, found in ((key, keys), (value, values)):
                level_map = source[b, starts[level] : starts[level + 1], channels]
                level_map = level_map.T.reshape(1, depth, h, w)
                sampled = F.grid_sample(level_map, (2 * at - 1).view(1, 1, 1, 2), align_corners=False)
                found.append(sampled.flatten())
        score = torch.stack(keys) @ attention.query_proj(query)[b, q, channels] / depth**0.5
        rows.append(score.softmax(0) @ torch.stack(values))
    return attention.output_proj(torch.cat(rows).view(BATCH, QUERIES, WIDTH))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_it_is_what_the_paper_defines(options, boxes):
    attention, arguments = layer(**options), inputs(boxes)
    found, samples = attention(*arguments)
    assert samples is None
    assert_close(found, as_defined(attention, *arguments))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    attention = layer(**options)
    query, reference, value, shapes, mask = inputs()
    leaves = [x.requires_grad_() for x in (query, reference, value)]

    def function(query, reference, value, *parameters):
        state = dict(zip(dict(attention.named_parameters()), parameters))
        arguments = query, reference, value, shapes, mask
        return torch.func.functional_call(attention, state, arguments)[0]

    assert torch.autograd.gradcheck(function, (*leaves, *attention.parameters()), fast_mode=True)


def test_shared_offsets_are_cells_of_every_level():
    for cls in (KeyAwareDeformAttn, MSDeformAttn):
        shared, free = layer(cls=cls, shared_offsets=True), layer(cls=cls)
        state = shared.state_dict()
        for name in ("sampling_offsets.weight", "sampling_offsets.bias"):
            per_head = state[name].unflatten(0, (HEADS, 1, POINTS * 2))
            state[name] = per_head.expand(-1, len(SHAPES), *per_head.shape[2:]).flatten(0, 2)
        free.load_state_dict(state)
        assert_close(shared(*inputs())[0], free(*inputs())[0])


def test_padding_is_never_read():
    attention = layer(key_projection=True)
    query, reference, value, shapes, mask = inputs()
    other = torch.where(mask[..., None], torch.full_like(value, 1e6), value)
    assert_close(
        attention(query, reference, value, shapes, mask)[0],
        attention(query, reference, other, shapes, mask)[0],
    )


def test_a_sample_outside_keeps_its_part_of_the_softmax():
    """Score 0, not minus infinity: one sample inside among n weighs e^s / (e^s + n - 1)."""
    attention = KeyAwareDeformAttn(embed_dim=1, num_heads=1, num_levels=1, num_points=3).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.fill_(1.0 if "proj.weight" in name else 0.0)
        attention.sampling_offsets.bias.copy_(torch.tensor([0.0, 0, 100, 0, 0, -100]))
    query, value = torch.tensor([[[2.0]]]).double(), torch.tensor([[[3.0]]]).double()
    centre = torch.full((1, 1, 1, 2), 0.5, dtype=torch.double)
    out, samples = attention(query, centre, value, ((1, 1),), record=True)
    inside = torch.tensor(6.0).double().exp()
    assert_close(out.flatten(), 3 * inside[None] / (inside + 2))
    assert_close(samples.weights.flatten(), torch.stack([inside, *torch.ones(2)]) / (inside + 2))


def test_nothing_inside_the_map_is_harmless():
    attention = layer()
    query, reference, value, shapes, mask = inputs()
    query.requires_grad_()
    out, _ = attention(query, reference + 50, value, shapes, mask)
    assert_close(out, attention.output_proj.bias.expand_as(out))
    out.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_recorded_samples_explain_the_output(options):
    attention = layer(**options)
    query, reference, value, shapes, mask = inputs(boxes=True)
    out, samples = attention(query, reference, value, shapes, mask, record=True)
    assert_close(out, attention(query, reference, value, shapes, mask)[0])
    assert samples.locations.shape == (BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2)
    assert not samples.weights.requires_grad and not samples.locations.requires_grad
    assert_close(samples.weights.sum((-1, -2)), torch.ones_like(samples.weights[..., 0, 0]))
    values = attention.value_proj(value).masked_fill(mask[..., None], 0).unflatten(-1, (HEADS, -1))
    again = ms_deform_attn(values, shapes, samples.locations, samples.weights)
    assert_close(attention.output_proj(again), out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_initial_weights(options):
    """Offsets point in M directions, one cell further per point; the projections are random."""
    attention = KeyAwareDeformAttn(num_heads=8, num_points=4, **options)
    assert (attention.sampling_offsets.weight == 0).all()
    offsets = attention.offsets(torch.randn(1, 1, 256))[0, 0]  # (M, L, P, 2)
    assert offsets.shape == (8, 4, 4, 2)
    assert_close(offsets[0, 2], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    assert_close(offsets[3, 1, 1], torch.tensor([-2.0, 2.0]))
    names = {"sampling_offsets", "value_proj", "query_proj", "output_proj"}
    names |= {"key_proj"} if options["key_projection"] else set()
    assert {name.split(".")[0] for name in attention.state_dict()} == names
    for name in names - {"sampling_offsets"}:
        projection = getattr(attention, name)
        assert (projection.bias == 0).all()
        assert 0.9 < projection.weight.abs().max() / (6 / 512) ** 0.5 <= 1


def test_it_takes_the_place_of_plain_attention_in_a_decoder_layer():
    plain, aware = (
        DeformableDecoderLayer(
            cross_attention=cls(embed_dim=32, num_heads=4, num_levels=3, num_points=2),
            embed_dim=32,
            num_heads=4,
            ffn_dim=48,
        ).cross_attention
        for cls in (MSDeformAttn, KeyAwareDeformAttn)
    )
    arguments = torch.randn(1, 5, 32), torch.rand(1, 5, 3, 4), torch.randn(1, TOKENS, 32), SHAPES
    for record in (False, True):
        for a, b in zip(plain(*arguments, record=record), aware(*arguments, record=record)):
            assert (a is None and b is None) or [x.shape for x in a] == [x.shape for x in b]


def test_scores_are_computed_in_float32_under_autocast():
    attention = layer(seed=3).float()
    query, reference, value, shapes, mask = inputs()
    arguments = query.float(), reference.float(), value.float(), shapes, mask
    wanted, _ = attention(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out, samples = attention(*arguments, record=True)
    assert samples.weights.dtype == samples.locations.dtype == torch.float32
    # Rounded are the inputs, weights and results of four projections: by half an eps each at most.
    assert (out.float() - wanted).norm() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_embed_dim_must_divide_into_heads():
    with pytest.raises(ValueError, match="KeyAwareDeformAttn: embed_dim=30 must be a multiple"):
        KeyAwareDeformAttn(embed_dim=30, num_heads=4)

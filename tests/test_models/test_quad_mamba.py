"""What QuadMamba alone has: sampled windows, token orders, shifts, padding."""
import pytest
import torch
from mmengine.registry import MODELS

from mmvssm.models.backbones.quad_mamba import MultiDirectionSSM, QuadMamba, QuadtreeSSM

MICRO = dict(embed_dims=8, depths=(2, 4, 1, 1))
ORDERS = ('released', 'quadtree')


def build(**kwargs):
    torch.manual_seed(0)
    return QuadMamba(MICRO, **kwargs)


def image(height=64, width=64, seed=1):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mixer(dim=8, **kwargs):
    torch.manual_seed(0)
    mixer = QuadtreeSSM(dim, **kwargs)
    mixer.reset_ssm_parameters()
    return mixer.eval()


@pytest.mark.parametrize('token_order', ORDERS)
def test_evaluation_draws_no_random_numbers(token_order):
    model = build(token_order=token_order).eval()
    state = torch.get_rng_state()
    with torch.inference_mode():
        first, second = model(image()), model(image())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('token_order', ORDERS)
def test_training_samples_with_the_seed(token_order):
    model = build(token_order=token_order).train()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(image())[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_token_orders_differ_in_the_quadtree_stages_only():
    released, quadtree = build(), build(token_order='quadtree')
    quadtree.load_state_dict(released.state_dict())
    with torch.inference_mode():
        x = released.patch_embed(image()).permute(0, 2, 3, 1)
        mixed = [model.eval().layers[0].blocks[0](x)[0] for model in (released, quadtree)]
    assert not torch.equal(*mixed)
    kinds = [[type(block.op) for block in layer.blocks] for layer in released.layers]
    assert [set(kind) for kind in kinds] == [{QuadtreeSSM}] * 2 + [{MultiDirectionSSM}] * 2


@pytest.mark.parametrize('depths, signs', [
    ((2, 4, 1, 1), [[(0, 0), (1, 1)], [(0, 0), (-1, -1), (0, 0), (1, -1)]]),
    ((2, 2, 5, 2), [[(0, 0), (1, 1)], [(0, 0), (-1, -1)]]),
    ((4, 4, 1, 1), [[(0, 0), (1, 1), (0, 0), (-1, -1)], [(0, 0), (1, -1), (0, 0), (-1, 1)]]),
], ids=str)
def test_every_other_block_is_shifted(depths, signs):
    model = QuadMamba(dict(embed_dims=8, depths=depths))
    assert [[block.op.shift_sign for block in layer.blocks] for layer in model.layers[:2]] == signs


@pytest.mark.parametrize('token_order', ORDERS)
@pytest.mark.parametrize('height, width', [(16, 8), (8, 8)])
def test_shift_is_a_roll_of_the_map(height, width, token_order):
    """Scores follow the map in the quadtree's order only."""
    plain, shifted = mixer(token_order=token_order), mixer(token_order=token_order, shift_sign=(1, -1))
    x, step = torch.randn(1, height, width, 16), height // 8
    for ssm in (plain, shifted):  # the window does not depend on the tokens
        ssm.score_predictor = torch.nn.Module()
        ssm.score_predictor.forward = lambda x: torch.zeros(x.shape[:3])
    with torch.inference_mode():
        expected = plain.mix(x.roll((step, -step), (1, 2))).roll((-step, step), (1, 2))
        assert torch.equal(shifted.mix(x), expected)


@pytest.mark.parametrize('token_order, moves', [('released', False), ('quadtree', True)])
def test_scores_and_shift(token_order, moves, monkeypatch):
    from mmvssm.models.backbones import quad_mamba
    seen = []

    def spy(scores, shift):
        seen.append(shift)
        return scores.mean((1, 2)).unsqueeze(1).expand(-1, 4)

    monkeypatch.setattr(quad_mamba, 'window_scores', spy)
    mixer(token_order=token_order, shift_sign=(-1, 1)).mix(torch.randn(1, 16, 8, 16))
    assert seen == [(-2, 2) if moves else (0, 0)]


@pytest.mark.parametrize('token_order', ORDERS)
@pytest.mark.parametrize('height, width', [(7, 10), (1, 1), (3, 8), (9, 4)])
def test_pads_first_and_crops_last(height, width, token_order):
    ssm, x = mixer(token_order=token_order, shift_sign=(1, 1)), torch.randn(2, height, width, 16)
    padded = torch.zeros(2, -(-height // 4) * 4, -(-width // 4) * 4, 16)
    padded[:, :height, :width] = x
    with torch.inference_mode():
        assert torch.equal(ssm.mix(x), ssm.mix(padded)[:, :height, :width])


@pytest.mark.parametrize('size', [(64, 96), (36, 20), (9, 5)], ids=str)
def test_every_parameter_gets_a_gradient_in_quadtree_order(size):
    model = build(token_order='quadtree').train()
    sum(f.square().sum() for f in model(image(*size))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if min(size) > 8:
        assert [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_scores_are_float32_under_autocast():
    predictor = mixer().score_predictor
    with torch.autocast('cpu', torch.bfloat16):
        assert predictor(torch.randn(1, 4, 4, 16)).dtype == torch.float32


@pytest.mark.parametrize('token_order', ['zigzag', None, 'Quadtree'])
def test_unknown_token_order(token_order):
    with pytest.raises(ValueError) as raised:
        MODELS.build(dict(type='QuadMamba', arch='lite', token_order=token_order))
    assert f'QuadMamba: token_order={token_order!r}, expected one of released, quadtree' in str(raised.value)

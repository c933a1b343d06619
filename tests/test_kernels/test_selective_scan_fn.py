"""What belongs to the scan with Mamba's interface alone."""
import dataclasses
import functools
import itertools
import math
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import DEVICES, Call, backends, cotangent_like, evaluate, expected, poisoned_memory, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import selective_scan_fn, selective_scan_fn_reference, use_backend
from mmvssm.kernels._core.cases import lay_out, relative_error

CASES = room('selective_scan_fn', 'cases').CASES
README = pathlib.Path(__file__).parents[2] / 'kernels' / 'selective_scan_fn' / 'README.md'


def inputs(name, dtype=torch.float64):
    return room('selective_scan_fn', 'cases').inputs(CASES[name], dtype)


def scan_by_scalars(u, delta, A, B, C, D, z, delta_bias):
    """The docstring's equations for varying projections, one number at a time."""
    out = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            h = [0.0] * A.shape[1]
            for t in range(u.shape[2]):
                x, gate = u[b, d, t].item(), z[b, d, t].item()
                step = math.log(1 + math.exp(delta[b, d, t].item() + delta_bias[d].item()))
                y = D[d].item() * x
                for n in range(len(h)):
                    h[n] = math.exp(step * A[d, n].item()) * h[n] + step * B[b, n, t].item() * x
                    y += C[b, n, t].item() * h[n]
                out[b, d, t] = y * gate / (1 + math.exp(-gate))
    return out


def test_reference_computes_the_equations():
    tensors = inputs('tiny')
    torch.testing.assert_close(selective_scan_fn_reference(**tensors, delta_softplus=True), scan_by_scalars(**tensors))


@pytest.mark.parametrize('kind', ['constant', 'varying', 'one_group'])
def test_projections_that_repeat_are_groups(kind):
    """Constant ones are groups of one channel each, repeated along the steps; varying ones are one group."""
    tensors = inputs('tiny-constant' if kind == 'constant' else 'tiny')
    batch, _, length = tensors['u'].shape
    grouped = dict(tensors)
    for name in 'BC':
        t = tensors[name]
        grouped[name] = t[None, :, :, None].expand(batch, *t.shape, length) if kind == 'constant' else t[:, None]
    if kind == 'one_group':
        tensors, grouped = grouped, {**tensors, 'B': tensors['B'][:, None].expand(-1, 2, -1, -1)}
    torch.testing.assert_close(selective_scan_fn(**tensors), selective_scan_fn(**grouped))
    torch.testing.assert_close(selective_scan_fn_reference(**tensors), selective_scan_fn_reference(**grouped))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('backend', backends('selective_scan_fn'))
@pytest.mark.parametrize('name', ['length_257', 'length_1', 'no_batch', 'constant_B'])
def test_last_state(name, backend, device):
    call = Call('selective_scan_fn', name, backend, device)
    tensors = call.inputs(torch.bfloat16)
    options = dict(delta_softplus='softplus' in CASES[name].options, return_last_state=True)
    wide = {key: None if t is None else t.double() for key, t in tensors.items()}
    with use_backend(backend):
        out, state = selective_scan_fn(**tensors, **options)
        alone = call.forward(tensors)
    assert torch.equal(out, alone)
    assert state.dtype == torch.float32
    assert relative_error(state, selective_scan_fn_reference(**wide, **options)[1]) < 1e-6


def test_no_gradient_through_the_last_state():
    tensors = {name: t.requires_grad_() for name, t in inputs('tiny').items()}
    out, state = selective_scan_fn(**tensors, return_last_state=True)
    assert out.requires_grad
    assert not state.requires_grad


def test_no_steps():
    tensors = {name: t[..., :0] if t.dim() > 2 else t for name, t in inputs('tiny').items()}
    out, state = selective_scan_fn(**tensors, return_last_state=True)
    assert out.shape == tensors['u'].shape
    assert torch.equal(state, torch.zeros(2, 2, 2, dtype=torch.float64))
    grads = evaluate(lambda case, t: selective_scan_fn(**t), CASES['tiny'], tensors)
    assert all(grad.eq(0).all() for grad in grads.values())


@pytest.mark.parametrize('name', ['length_1000', 'length_257', 'constant_B', 'constant_C'])
def test_bits_do_not_depend_on_threads(name):
    """With many of them the chunks of a sequence are shared out as well."""
    call = Call('selective_scan_fn', name, 'cpu')
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(call.evaluate(call.inputs(torch.float32)))
    for other in results[1:]:
        assert all(torch.equal(other[key], t) for key, t in results[0].items())


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('backend', backends('selective_scan_fn'))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_precisions_may_differ(dtype, backend, device):
    """As under autocast, where steps often are float32: gradients have the precision of their tensors."""
    call = Call('selective_scan_fn', 'groups_differ', backend, device)
    tensors = call.inputs(dtype)
    tensors = {**tensors, 'delta': tensors['delta'].float(), 'z': tensors['z'].half()}
    call.check(call.evaluate(tensors), call.expected(tensors))


def test_vims_function_in_readme():
    """Beside what Vim's blocks get from the function that it replaces, token by token."""
    code, = re.findall(r'^```python\n(def mamba_inner_fn_no_out_proj.*?)^```$', README.read_text(), re.M | re.S)
    names = dict(F=F, selective_scan_fn=selective_scan_fn)
    exec(code, names)
    generator = torch.Generator().manual_seed(0)
    xz, conv, conv_bias, x_proj, dt_proj, A, D, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 12, 9), (6, 1, 4), (6,), (2 + 3 + 3, 6), (6, 2), (6, 3), (6,), (6,)))
    A = -A.exp()
    got = names['mamba_inner_fn_no_out_proj'](xz, conv, conv_bias, x_proj, dt_proj, A, None, None, D, delta_bias=bias,
                                              delta_softplus=True)
    x, z = xz[:, :6], xz[:, 6:]
    x = F.silu(torch.stack([(conv[:, 0] * F.pad(x, (3, 0))[..., t:t + 4]).sum(-1) + conv_bias for t in range(9)], -1))
    tokens = F.linear(x.mT, x_proj)
    delta = F.linear(tokens[..., :2], dt_proj).mT
    expected = selective_scan_fn_reference(x, delta, A, tokens[..., 2:5].mT, tokens[..., 5:].mT, D, z, bias, True)
    torch.testing.assert_close(got, expected)


def sizes():
    """Backend, device, states and steps. Triton's interpreter gets the small ones, a GPU all of them."""
    for backend in backends('selective_scan_fn'):
        for device in DEVICES:
            if backend == 'torch' or (backend, device) in (('cuda', 'cpu'), ('cpu', 'cuda')):
                continue
            for d_state in (1, 3, 16, 64, 256):
                for length in (1, 7, 64, 1000, 4097, 67200):
                    if (backend, device) != ('triton', 'cpu') or d_state * math.ceil(length / 256) <= 16:
                        yield backend, device, d_state, length


def case_of_size(d_state, length):
    cases = room('selective_scan_fn', 'cases')
    dim = 2 if d_state * length > 1e6 else 4
    return cases, cases.Case(f'size-{d_state}-{length}', batch=1, dim=dim, length=length, d_state=d_state, B=2)


@functools.cache
def expected_of_size(d_state, length):
    """In float64; of many steps by PyTorch's operations chunk by chunk, since step by step it would take minutes."""
    cases, case = case_of_size(d_state, length)
    tensors = cases.inputs(case, torch.float32)
    cotangent = cotangent_like(tensors['u'], case.name).double()
    tensors = {name: t.double() for name, t in tensors.items()}
    with use_backend('torch'):
        return evaluate(cases.reference if length <= 64 else cases.operator, case, tensors, cotangent=cotangent)


@pytest.mark.parametrize('backend, device, d_state, length', sizes())
def test_sizes(backend, device, d_state, length):
    cases, case = case_of_size(d_state, length)
    Call('selective_scan_fn', 'tiny', backend, device).inputs(torch.float32)  # or skip
    with use_backend(backend):
        got = evaluate(cases.operator, case, cases.inputs(case, torch.float32, device))
    Call('selective_scan_fn', None, backend, device).check(got, expected_of_size(d_state, length))


@pytest.mark.parametrize('gpu, d_state, first', [(True, 1, 'triton'), (True, 2, 'cuda'), (False, 1, 'cuda')])
def test_forward_order(gpu, d_state, first, monkeypatch):
    dispatch = room('selective_scan_fn', 'dispatch')
    monkeypatch.setattr(dispatch, 'has_triton', lambda tensor: gpu)
    order = dispatch.forward_order(dispatch.BACKENDS, torch.zeros(1), d_state)
    assert order[0].name == first
    assert sorted(b.name for b in order) == sorted(backends('selective_scan_fn'))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('forward, backward', itertools.permutations(backends('selective_scan_fn'), 2))
def test_backward_of_another_backend(forward, backward, device):
    """What forward saves is the same in all of them."""
    cases, case = case_of_size(1, 1000)
    for backend in forward, backward:
        Call('selective_scan_fn', 'tiny', backend, device).inputs(torch.float32)  # or skip
    tensors = {name: t.requires_grad_() for name, t in cases.inputs(case, torch.float32, device).items()}
    with use_backend(forward):
        out = cases.operator(case, tensors)
    with use_backend(backward):
        grads = torch.autograd.grad(out, tensors.values(), cotangent_like(out, case.name))
    got = dict(output=out.detach(), **dict(zip(tensors, grads)))
    Call('selective_scan_fn', None, backward, device).check(got, expected_of_size(1, 1000))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('backend', backends('selective_scan_fn'))
def test_layouts_may_differ(backend, device):
    """As in blocks, where some tensors are products and others parts of one."""
    call = Call('selective_scan_fn', 'channels_last-16', backend, device)
    tensors = call.inputs(torch.float32)
    dense = call.evaluate({key: t.contiguous() for key, t in tensors.items()})
    for layouts in (dict(u='channels_first', z='half', C='half'), dict(delta='channels_first', u='half', B='half'),
                    dict(z='channels_first', B='channels_first')):
        laid_out = {key: lay_out(t, layouts.get(key, 'contiguous')) for key, t in tensors.items()}
        call.check(call.evaluate(laid_out), dense)


def test_triton_copies_no_more_than_it_must():
    """Rows of steps and rows of channels are read as they lie in memory, of ``B`` and ``C`` the former alone. What is
    small is left out."""
    pytest.importorskip('triton')
    launch = room('selective_scan_fn', 'triton.tiles').Launch

    def copied(case, **changes):
        tensors = {**room('selective_scan_fn', 'cases').inputs(case, torch.bfloat16), **changes}
        tensors.update({name: tensors[name].unsqueeze(1) for name in 'BC' if tensors[name].dim() == 3})
        run = launch(*tensors.values(), True, tensors['u'], 256, 4)
        return [name for name, t, read in zip([*tensors, 'grad'], [*tensors.values(), tensors['u']], run.tensors)
                if name != 'A' and t.data_ptr() != read.data_ptr()]

    case = CASES['length_64']
    half, last = (dataclasses.replace(case, layout=layout) for layout in ('half', 'channels_first'))
    assert copied(case) == copied(half) == []
    assert copied(last) == ['B', 'C']
    assert copied(CASES['dim_37']) == ['B', 'C']  # rows of 9 steps
    scattered = torch.zeros(2, 6, 128, dtype=torch.bfloat16)[..., ::2]
    assert copied(case, z=scattered) == ['z']


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('few, enough, segments', [(0, 0, 1), (99, 8, 2), (99, 99, 4)])
def test_triton_cuts_the_sequence(few, enough, segments, device, monkeypatch):
    """Its four warps walk all chunks, or are made more: segments of two chunks, or of one. Nothing is read that nobody
    wrote."""
    call = Call('selective_scan_fn', 'length_1000', 'triton', device)
    tensors = call.inputs(torch.float32)
    tiles = room('selective_scan_fn', 'triton.tiles')
    monkeypatch.setattr(tiles, '_FEW_WARPS', few)
    monkeypatch.setattr(tiles, '_ENOUGH_WARPS', enough)
    cut, init = [], tiles.Launch.__init__
    monkeypatch.setattr(tiles.Launch, '__init__', lambda self, *args: cut.append(self) or init(self, *args))
    with poisoned_memory():
        got = call.evaluate(tensors)
    assert [run.segments for run in cut] == [segments] * 2
    call.check(got, expected('selective_scan_fn', 'length_1000', torch.float32))


@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C'])
def test_no_argument_that_must_be_there(name):
    with pytest.raises(TypeError, match=f'^selective_scan_fn: {name} is a NoneType, expected a Tensor'):
        selective_scan_fn(**{**inputs('tiny'), name: None})


def wider(t):
    return t[:, :1].expand(-1, 257)


BAD_INPUTS = {
    'u-dims': (dict(u=lambda t: t[0]), ValueError, r'u has shape \(2, 5\), expected \(B, D, L\)'),
    'u-no_channel': (dict(u=lambda t: t[:, :0]), ValueError, 'u has 0 channels, expected 1 or more'),
    'u-dtype': (dict(u=lambda t: t.long()), TypeError, 'u has dtype torch.int64'),
    'delta-shape': (dict(delta=lambda t: t[..., 1:]), ValueError, r'delta has shape \(2, 2, 4\).*\(2, 2, 5\)'),
    'A-complex': (dict(A=lambda t: t.to(torch.complex64)), TypeError, r'A is complex \(torch.complex64\), .* real'),
    'A-dims': (dict(A=lambda t: t[0]), ValueError, r'A has shape \(2,\), expected \(D, N\)'),
    'A-channels': (dict(A=lambda t: t[:1]), ValueError, r'A has shape \(1, 2\), expected.*\(2, 2\)'),
    'A-states': (dict(A=wider), ValueError, 'A has 257 states, expected 1 to 256'),
    'A-no_state': (dict(A=lambda t: t[:, :0]), ValueError, 'A has 0 states, expected 1 to 256'),
    'B-complex': (dict(B=lambda t: t.to(torch.complex128)), TypeError, 'B is complex'),
    'B-dims': (dict(B=lambda t: t[0, 0]), ValueError, r'B has shape \(5,\), expected \(D, N\), \(B, N, L\) or'),
    'B-constant': (dict(B=lambda t: t[0, :, :3]), ValueError, r'B has shape \(2, 3\), expected.*\(2, 2\)'),
    'B-length': (dict(B=lambda t: t[..., 1:]), ValueError, r'B has shape \(2, 2, 4\), expected.*\(2, 2, 5\)'),
    'B-states': (dict(B=lambda t: t[:, None, :1]), ValueError, r'B has shape \(2, 1, 1, 5\), expected.*\(2, 1, 2, 5\)'),
    'C-groups': (dict(C=lambda t: t[:, None].expand(-1, 3, -1, -1)), ValueError, 'C has 3 groups, expected a divisor'),
    'C-no_group': (dict(C=lambda t: t[:, None][:, :0]), ValueError, 'C has 0 groups'),
    'D-shape': (dict(D=lambda t: t[1:]), ValueError, r'D has shape \(1,\), expected.*\(2,\)'),
    'z-shape': (dict(z=lambda t: t.mT), ValueError, r'z has shape \(2, 5, 2\), expected.*\(2, 2, 5\)'),
    'delta_bias-shape': (dict(delta_bias=lambda t: t[:, None]), ValueError, r'delta_bias has shape \(2, 1\)'),
    'delta_bias-device': (dict(delta_bias=lambda t: t.to('meta')), ValueError, 'one device, .*delta_bias on meta'),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    tensors = inputs('tiny')
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^selective_scan_fn: .*' + message):
        selective_scan_fn(**tensors)


@pytest.mark.parametrize('name, per_step', [('tiny', 9 * 2 + 2), ('length_257', 9 + 1), ('tiny-constant', 9 * 2)])
def test_flops(name, per_step):
    tensors = {key: t for key, t in inputs(name).items() if t is not None}

    class Model(torch.nn.Module):

        def forward(self, *args):
            return selective_scan_fn(**dict(zip(tensors, args)))

    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'selective_scan_fn': per_step * tensors['u'].numel()}

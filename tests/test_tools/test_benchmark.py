"""tools/benchmarks/run.py on the CPU with tiny shapes: what it reports, and that it refuses wrong results."""
import dataclasses
import json
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tool_testing import load_tool

run = load_tool('benchmarks/run')

QUICK = ['--device', 'cpu', '--seconds', '0', '--dtype', 'fp32']
TINY = ['--arch', '16,1,1,1,1']
OPERATORS = ['ops', *QUICK, '--shape', '2,8,4,4']
MODELS = ['models', *QUICK, *TINY, '--batch', '4', '--size', '32', '48']
DENSE = ['dense', *QUICK, *TINY, '--detection', '1x64x96', '--segmentation', '2x64x64']


@pytest.fixture(autouse=True)
def _fast_compiler(monkeypatch):
    """Code as traced, without minutes of C++ compilation; and compiled functions do not outlive their test."""
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: compile(f, **{**kwargs, 'backend': 'aot_eager'}))
    with run.inductor_config.patch(fallback_random=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def _slim_heads(monkeypatch):
    """Detectors and segmentors of a few channels and regions."""
    slim = run.slim

    def slimmer(cfg, arch):
        model = slim(cfg, arch).model
        if 'neck' in model:
            model.neck.out_channels = model.rpn_head.in_channels = model.rpn_head.feat_channels = 16
            heads = model.roi_head
            for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
                part.out_channels = 16
            heads.bbox_head.update(in_channels=16, fc_out_channels=16)
            heads.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)
            model.train_cfg.rpn_proposal.max_per_img = model.train_cfg.rcnn.sampler.num = 16
        else:
            model.decode_head.channels = model.auxiliary_head.channels = 16
        return cfg

    monkeypatch.setattr(run, 'slim', slimmer)


def rows(path):
    """Rows of the last run in a .json file, by case."""
    last = json.loads(path.read_text())[-1]
    assert {'device', 'torch', 'python', 'mmvssm', 'command'} <= set(last['system'])
    return {row['case']: row for row in last['rows']}


def spoil(monkeypatch, room, step, but_torch=False):
    """Make the backends of an operator return 1.1 times what they should, in ``step`` of forward and backward;
    ``but_torch``: a spoilt copy of backend torch, first, while that itself stays as it is."""
    ops = import_module(f'mmvssm.kernels.{room}.ops')

    def wrong(backend):
        def run(*args, **kwargs):
            results = getattr(backend, step)(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                return 1.1 * results
            return (1.1 * results[0], *results[1:])
        return dataclasses.replace(backend, **{step: run})

    spoilt = tuple(map(wrong, ops.BACKENDS))
    if but_torch:
        spoilt = (dataclasses.replace(spoilt[-1], name='spoilt'), ops.BACKENDS[-1])
        assert spoilt[-1].name == 'torch'
    monkeypatch.setattr(ops, 'BACKENDS', spoilt)


def test_operators(tmp_path, capsys):
    out = tmp_path / 'results' / 'gpu.json'
    assert run.main([*OPERATORS, '--out', str(out)]) == 0
    found = rows(out)
    assert found.pop('copy on the device')['rate'] > 0
    names = ['scan B2 D8', 'fusion B2 D8', 'conv_silu B2 D8', 'conv_norm B2 D4', 'norm_gate B2 D8',
             'downsample B2 D32']
    assert list(found) == [f'{name} 4x4 {step}' for name in names for step in ('fwd', 'fwd+bwd')]
    for row in found.values():
        low, middle, high = row['ms']
        assert 0 < low <= middle <= high
        assert row['rate'] > 0
        assert row['host_us'] > 0
        assert row['dtype'] == 'fp32'
        assert {'output', 'x'} < set(row['errors'])
        assert max(row['errors'].values()) < 1e-5
        assert 'torch_ms' in row or row['backend'] == 'torch'
    table = capsys.readouterr().out
    assert all(f'| {name} ' in table for name in found)


def test_runs_are_appended(tmp_path):
    out = tmp_path / 'gpu.json'
    for op in ('scan', 'fusion'):
        assert run.main([*OPERATORS, '--op', op, '--no-compose', '--out', str(out)]) == 0
    first, second = json.loads(out.read_text())
    assert first['rows'][1]['case'].startswith('scan')
    assert second['rows'][1]['case'].startswith('fusion')
    assert second['system']['command'].endswith(str(out))


@pytest.mark.parametrize('op', run.OPERATORS)
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_every_operator_in_half_precision(op, dtype, tmp_path):
    out = tmp_path / 'gpu.json'
    assert run.main([*OPERATORS, '--op', op, '--dtype', dtype, '--no-compose', '--out', str(out)]) == 0
    assert len(rows(out)) == 3


def test_repeated_images_are_compared_one_by_one():
    generator = torch.Generator().manual_seed(0)
    image, gradient = (torch.randn(shape, generator=generator).double() for shape in ((2, 3, 5), (5,)))
    repeated = image.repeat(4, 1, 1)
    assert run.error_of(repeated, image, 4, per_image=True) == 0
    assert run.error_of(4 * gradient, gradient, 4, per_image=False) == 0
    repeated[5] = 0  # of the third copy
    assert run.error_of(repeated, image, 4, per_image=True) == pytest.approx(
        (image[1].square().sum() / (4 * image.square().sum())).sqrt().item())
    repeated[5] = torch.nan
    assert not run.acceptable(dict(output=run.error_of(repeated, image, 4, per_image=True)), 1, 1)


@pytest.mark.usefixtures('_slim_heads')
@pytest.mark.parametrize('step', ['forward', 'backward'])
@pytest.mark.parametrize('command', [OPERATORS, MODELS, DENSE], ids=['ops', 'models', 'dense'])
def test_wrong_results_have_no_speed(command, step, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'gpu.json'
    if command is OPERATORS:
        command = [*OPERATORS, '--op', 'scan', 'norm_gate']
        spoil(monkeypatch, 'norm_gate', step)
    else:  # their reference are PyTorch's operations
        spoil(monkeypatch, 'norm_gate', step, but_torch=True)
    assert run.main([*command, '--out', str(out)]) == 1
    found = rows(out)
    wrong = [row for row in found.values() if row.get('wrong')]
    assert wrong
    for row in wrong:
        assert not {'ms', 'rate'} & set(row)
    assert 'WRONG' in capsys.readouterr().out
    if command[0] == 'ops':
        assert [row['case'] for row in wrong] == ['norm_gate B2 D8 4x4']
        assert found['scan B2 D8 4x4 fwd']['rate'] > 0


def scans_side_by_side(monkeypatch, tmp_path, but=None):
    """Exit code and rows of ``scan_fn``, with stand-ins for the backends of a GPU and mamba_ssm; ``but`` is wrong."""
    room = 'mmvssm.kernels.selective_scan_fn.'
    reference = import_module(room + 'reference').selective_scan_fn_reference
    dispatch, ops = import_module(room + 'dispatch'), import_module(room + 'ops')

    def stand_in(name):
        def forward(*args, **kwargs):
            out, states = dispatch.BACKENDS[-1].forward(*args, **kwargs)
            return 1.1 * out if name == but else out, states
        return dataclasses.replace(dispatch.BACKENDS[-1], name=name, forward=forward)

    def peer(**kwargs):
        return (1.1 if but == 'mamba_ssm' else 1) * reference(**kwargs)

    backends = stand_in('cuda'), stand_in('triton'), dispatch.BACKENDS[-1]
    monkeypatch.setattr(ops, 'BACKENDS', backends)
    monkeypatch.setattr(dispatch, 'BACKENDS', backends)
    monkeypatch.setitem(sys.modules, 'mamba_ssm.ops.selective_scan_interface', SimpleNamespace(selective_scan_fn=peer))
    for package in 'mamba_ssm', 'mamba_ssm.ops':
        monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    out = tmp_path / 'gpu.json'
    code = run.main([*OPERATORS, '--op', 'scan_fn', '--out', str(out)])
    return code, [row for row in rows(out).values() if row['case'].startswith('scan_fn')]


def test_backends_side_by_side(tmp_path, monkeypatch, capsys):
    code, found = scans_side_by_side(monkeypatch, tmp_path)
    assert code == 0
    for row in found:
        assert list(row['beside']) == ['cuda', 'triton', 'mamba_ssm']
        assert row['beside']['cuda'] == row['ms'][1]
        assert min(row['beside'].values()) > 0
        assert max(row['errors_beside']['mamba_ssm'].values()) < 1e-5
    assert 'cuda ms | triton ms | peer ms' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('name, code', [('triton', 1), ('mamba_ssm', 0)])
def test_wrong_results_beside_have_no_speed(name, code, tmp_path, monkeypatch):
    exit_code, found = scans_side_by_side(monkeypatch, tmp_path, but=name)
    assert exit_code == code
    assert len(found) == 2
    for row in found:
        assert row['beside'][name] == 'WRONG'
        assert row['beside']['cuda'] > 0


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, capsys):
    out = tmp_path / 'gpu.json'
    command = [*OPERATORS, '--op', 'to_quadtree', 'norm_gate', '--shape', '2,8,3,5', '--out', str(out)]
    assert run.main(command) == 1
    found = rows(out)
    assert found['to_quadtree (2, 8, 3, 5)']['note'].startswith('not run: RuntimeError')
    assert found['norm_gate B2 D8 3x5 fwd']['rate'] > 0
    assert 'Traceback' in capsys.readouterr().err


def test_linear(tmp_path):
    out = tmp_path / 'gpu.json'
    assert run.main(['linear', *QUICK, '--op', 'scan', '--side', '4', '8', '--batch', '1', '--dim', '8',
                     '--out', str(out)]) == 0
    found = rows(out)
    small, large = (found[f'scan {side}x{side}: time per token, to that at the smallest'] for side in (4, 8))
    assert small['ratios'] == [1, 1]
    ms = [found[f'scan B1 D8 {side}x{side} fwd']['ms'][1] for side in (4, 8)]
    assert large['ratios'][0] == pytest.approx(ms[1] / ms[0] / 4, abs=2e-3)


def test_models(tmp_path):
    out = tmp_path / 'gpu.json'
    assert run.main([*MODELS, '--compile', '--compare', '--out', str(out)]) == 0
    found = rows(out)
    assert list(found) == [f'spatialmamba-t B4 32x48 {mode}{suffix}' for mode in ('infer', 'train')
                           for suffix in ('', ' compiled')]
    for name, row in found.items():
        assert row['rate'] == pytest.approx(4e3 / row['ms'][1], rel=1e-3)
        assert row['errors']['output'] < 1e-5
        assert row['errors']['gradients'] < 1e-4
        assert ('torch_ms' in row) == (not name.endswith('compiled'))
    assert found['spatialmamba-t B4 32x48 train compiled']['errors']['compiled'] < 1e-4


def test_quadmamba(tmp_path):
    out = tmp_path / 'gpu.json'
    assert run.main([*MODELS, '--model', 'quadmamba-li', '--out', str(out)]) == 0
    assert list(rows(out)) == ['quadmamba-li B4 32x48 infer', 'quadmamba-li B4 32x48 train']


@pytest.mark.usefixtures('_slim_heads')
@pytest.mark.parametrize('task, size', [('mask_rcnn', '1x64x96'), ('upernet', '2x64x64')])
def test_dense(task, size, tmp_path):
    out = tmp_path / 'gpu.json'
    options, more = {'mask_rcnn': (['--compile'], ['train compiled', 'backbone fwd+bwd compiled']),
                     'upernet': (['--with-cp'], ['train, with_cp'])}[task]
    assert run.main([*DENSE, '--task', task, *options, '--out', str(out)]) == 0
    parts = ['train', 'backbone fwd+bwd', 'backbone fwd', *more]
    assert list(rows(out)) == [f'{task} spatialmamba-t {size} {part}' for part in parts]


def test_training_run(trained, tmp_path):
    out = tmp_path / 'gpu.json'
    assert run.main(['training', str(trained / 'run'), '--device', 'cpu', '--out', str(out)]) == 0
    row = rows(out)['training of run']
    assert row['dtype'] == 'fp32'
    assert row['rate'] > 0
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} == set(row['results'])


def test_no_training_run(tmp_path):
    with pytest.raises(SystemExit, match='no work dir of tools/train.py'):
        run.main(['training', str(tmp_path), '--device', 'cpu'])


def test_everything_is_a_choice_of_the_others(monkeypatch):
    called = []
    for name in ('operators', 'models', 'dense'):
        monkeypatch.setattr(run, name, lambda args, report, meter: called.append(args))
    assert run.main(['all', '--device', 'cpu', '--backend', 'torch']) == 0
    assert {args.command for args in called} == {'ops', 'models', 'dense'}
    assert {(args.device, args.backend) for args in called} == {('cpu', 'torch')}
    named = {f'{run.operator_name(op, shape, run.default_states(op))} {step}' for args in called
             if args.command == 'ops' for op in args.op for shape in args.shape for step in ('fwd', 'fwd+bwd')}
    named |= {f'{model} B{args.batch} 224x224 {mode}{suffix}'
              for args in called if args.command == 'models' for model in args.model for mode in args.mode
              for suffix in (map(run.compiled_name, args.compile) if args.compile else [''])}
    assert {case for case in run.TARGETS if not case.startswith(('mask_rcnn', 'upernet'))} <= named


@pytest.mark.parametrize('option', [['--shape', '2,8,4'], ['--shape', '2,8,4,x'], ['--shape', '2,8,4,0']])
def test_bad_shape(option, capsys):
    with pytest.raises(SystemExit):
        run.main([*OPERATORS, *option])
    assert 'expected 4 whole numbers' in capsys.readouterr().err

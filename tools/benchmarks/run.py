"""Speed and memory of operators, whole models and detectors or segmentors in training, on a GPU or the CPU.

Every case is compared with a reference before it is timed: operators with theirs in float64, output and every
gradient, on the very tensors that are timed; models with themselves in float32 on PyTorch's own operations. A case
that differs is reported as WRONG, without a speed, and the exit code is 1. See README.md beside this file.
"""
import argparse
import contextlib
import functools
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch._inductor import config as inductor_config

import mmvssm
from mmvssm.engine.config import import_modules, keep_boxes_fp32
from mmvssm.kernels import (
    residual_conv_norm,
    selective_scan_reference,
    use_backend,
)
from mmvssm.kernels._core.backends import choose
from mmvssm.kernels._core.cases import lay_out
from mmvssm.kernels._core.recurrence import Recurrence
from mmvssm.models.backbones import QuadMamba, SpatialMamba

ROOT = Path(__file__).parents[2]
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)

#: Largest relative error of an operator's output against float64; gradients may have three times as much.
OPERATOR_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: The same of the logits or maps of models and, all parameters taken together, of gradients.
#: In half precision these are the roundings of a hundred layers; in float32 convolutions may be in TF32.
MODEL_ERROR = {torch.float32: (5e-3, 1e-3), torch.bfloat16: (5e-2, 2e-1), torch.float16: (1e-2, 6e-2)}
#: The same of a compiled model's gradients in training, to those in eager mode with the same random numbers: batch
#: statistics make more of roundings.
COMPILED_ERROR = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}

#: The same with gradient checkpointing, to those without.
WITH_CP_ERROR = 1e-6

#: (batch, D, H, W): the inner maps of Spatial-Mamba-T's stages at 224x224, and a detector's first.
SHAPES = ((128, 128, 56, 56), (128, 256, 28, 28), (128, 512, 14, 14), (128, 1024, 7, 7), (2, 128, 200, 336))
LINEAR_SIDES = (56, 112, 224, 448)

#: What a backbone calls, by the name on the command line: room, options of its case, what has a batch.
OPERATORS = dict(
    scan=('selective_scan', dict(), 'x dt B'),
    fusion=('state_fusion', dict(), 'h C x'),
    conv_silu=('depthwise_conv', dict(activation='silu'), 'x'),
    conv_residual=('depthwise_conv', dict(residual=True), 'x'),
    conv_norm=('residual_conv_norm', dict(), 'x branch'),
    norm_gate=('norm_gate', dict(), 'x z'),
    downsample=('downsample_conv', dict(), 'x'),
    scan_output=('selective_scan', dict(output='skip'), 'x dt B C'),
    cross_scan=('selective_scan', dict(output='skip', directions=4), 'x dt B C'),
    two_way_scan=('selective_scan', dict(output='skip', directions=2), 'x dt B C'),
    scan_fn=('selective_scan_fn', dict(options='D bias softplus'), 'u delta B C'),
    to_quadtree=('quadtree', dict(one_hot=True), 'x selected'),
    from_quadtree=('quadtree', dict(one_hot=True, inverse=True), 'x selected'),
)
#: The package with the operator that ``scan_fn`` stands in for.
PEER = 'mamba_ssm'
SPATIAL_MAMBA_OPERATORS = ('scan', 'fusion', 'conv_silu', 'conv_norm', 'norm_gate', 'downsample')
ARCHS = {
    'spatialmamba-t': (SpatialMamba, 'tiny'), 'spatialmamba-s': (SpatialMamba, 'small'),
    'spatialmamba-b': (SpatialMamba, 'base'), 'quadmamba-li': (QuadMamba, 'lite'),
    'quadmamba-t': (QuadMamba, 'tiny'), 'quadmamba-s': (QuadMamba, 'small'), 'quadmamba-b': (QuadMamba, 'base')}

#: At the end of an operator's name where the level-2 cache was not emptied.
WARM = ', warm cache'
#: Figures of the authors' releases, measured as here, with a warm cache.
RELEASE = json.loads((ROOT / 'tools' / 'benchmarks' / 'results' / 'release.json').read_text())
#: What we want on one H100 in bf16, ms of operators, backbones and dense steps, img/s of classifiers, and
#: peak memory.
TARGETS = {
    'scan B128 D128 56x56 fwd': '<= 0.13', 'scan B128 D128 56x56 fwd+bwd': '<= 0.45',
    'scan B2 D128 200x336 fwd': '<= 0.06',
    'scan_fn B8 D768 64x64 N16 fwd': '<= 0.356', 'scan_fn B8 D768 64x64 N16 fwd+bwd': '<= 1.78',
    'scan_fn B128 D384 14x14 N16 fwd': '<= 0.28', 'scan_fn B128 D384 14x14 N16 fwd+bwd': '<= 1.05',
    'fusion B128 D128 56x56 fwd': '<= 0.28', 'fusion B128 D128 56x56 fwd+bwd': '<= 1.2',
    'spatialmamba-t B128 224x224 infer': '>= 5500', 'spatialmamba-t B128 224x224 train': '>= 1500, 13 GiB',
    'spatialmamba-t B128 224x224 infer compiled': '>= 7500',
    'spatialmamba-t B128 224x224 train compiled': '>= 2200',
    'spatialmamba-t B128 224x224 infer compiled, CUDA graphs': '>= 7500',
    'spatialmamba-t B128 224x224 train compiled, CUDA graphs': '>= 2200',
    'spatialmamba-s B128 224x224 infer': '>= 3800', 'spatialmamba-s B128 224x224 train': '>= 950',
    'spatialmamba-b B128 224x224 infer': '>= 2500', 'spatialmamba-b B128 224x224 train': '>= 620',
    'quadmamba-li B128 224x224 infer': '>= 9000', 'quadmamba-li B128 224x224 train': '>= 3200, 6 GiB',
    'quadmamba-t B128 224x224 infer': '>= 7000', 'quadmamba-t B128 224x224 train': '>= 2500, 8 GiB',
    'quadmamba-s B128 224x224 infer': '>= 4200', 'quadmamba-s B128 224x224 train': '>= 1500, 14 GiB',
    'quadmamba-b B128 224x224 infer': '>= 2800', 'quadmamba-b B128 224x224 train': '>= 1000, 21 GiB',
    'mask_rcnn spatialmamba-t 2x800x1344 backbone fwd+bwd': '<= 50',
    'mask_rcnn spatialmamba-t 2x800x1344 train': '5 GiB',
    'upernet spatialmamba-t 16x512x512 train': '<= 375, 21 GiB',
}


# Measuring


class Meter:
    """Times functions on one device."""

    #: Written between calls, more than any level-2 cache holds.
    CACHE_BYTES = 1 << 28
    #: Cycles that the GPU waits for each second that the CPU takes to queue a call, so that it has queued all of it
    #: before it begins: twice as long as that.
    HEAD_START = 4e9

    def __init__(self, device, seconds):
        self.device, self.seconds = torch.device(device), seconds
        self.cuda = self.device.type == 'cuda'

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clock(self, function):
        """Seconds that one call takes."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def times(self, function, alone=False, cold=False, seconds=None):
        """Milliseconds of calls after each other; ``alone``: the CPU's time left out; ``cold``: the level-2 cache
        emptied before each."""
        for _ in range(3):
            function()
        lasts = self.clock(function)
        repeats = min(max(int((seconds or self.seconds) / lasts), 5 if lasts > 0.1 else 20), 200)
        if not self.cuda:
            return [1e3 * self.clock(function) for _ in range(repeats)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        cache = torch.empty(self.CACHE_BYTES if cold else 0, dtype=torch.int8, device=self.device)
        head_start = int(self.HEAD_START * max(1e-6 * self.host_us(function), 2e-4)) if alone else 0
        for start, stop in events:
            if cold:
                cache.zero_()
            if alone:
                torch.cuda._sleep(head_start)
            start.record()
            function()
            stop.record()
        self.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]

    def host_us(self, function, repeats=20):
        """Microseconds of the CPU to queue one call."""
        function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        taken = time.perf_counter() - start
        self.synchronize()
        return 1e6 * taken / repeats

    def free(self):
        """Give back what nobody holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def peak_gib(self, function):
        """Memory of the whole process at its highest during one call."""
        if not self.cuda:
            return None
        self.free()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def copy_rate(self):
        """GB/s, read and written, of a copy on the device."""
        source = torch.empty((1 << 29) if self.cuda else (1 << 24), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        ms = statistics.median(self.times(lambda: target.copy_(source), seconds=min(self.seconds, 0.3)))
        return 2 * source.numel() / ms / 1e6


def composed_ms(function, meter, **kwargs):
    """Milliseconds with the operators composed of PyTorch's operations, or None and the reason."""
    try:
        with use_backend('torch'):
            return statistics.median(meter.times(function, seconds=meter.seconds / 4, **kwargs)), None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None, "PyTorch's operations run out of memory"


def quantiles(times):
    """20%, 50% and 80% of the times."""
    times = torch.tensor(times, dtype=torch.float64)
    return [round(q, 5) for q in torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()]


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or 'out of memory' in str(error)


# Reporting


def shell(*command):
    """The output of a command, None where it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT,
                              timeout=20).stdout.strip() or None
    return None


def describe_system(device, argv, program='tools/benchmarks/run.py'):
    system = dict(device=platform.processor() or platform.machine(), torch=torch.__version__,
                  python=platform.python_version(), mmvssm=mmvssm.__version__,
                  commit=shell('git', 'rev-parse', '--short', 'HEAD'),
                  command=' '.join([program, *argv]))
    if torch.device(device).type == 'cuda':
        system['device'] = torch.cuda.get_device_name(device)
        driver = shell('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
        system['driver'] = driver.split('\n')[0] if driver else None
        system['cudnn'] = torch.backends.cudnn.version()
        with contextlib.suppress(ImportError):
            system['triton'] = import_module('triton').__version__
    return {key: value for key, value in system.items() if value is not None}


class Report:
    """Rows of one run; they are printed and saved as they come, so that a run cut short leaves what it has."""

    COLUMNS = ('case', 'dtype', 'backend', 'ms', '20%', '80%', 'rate', 'of copy', 'GiB', 'host us', 'torch ms',
               'cuda ms', 'triton ms', 'peer ms', 'release', 'its GiB', 'target', 'error', 'grad error', '')

    def __init__(self, system, out=None):
        self.run, self.out, self.earlier = dict(system=system, rows=[]), out, []
        if out and out.exists():
            self.earlier = json.loads(out.read_text())
        self.started = time.perf_counter()

    @property
    def wrong(self):
        return any(row.get('wrong') for row in self.run['rows'])

    def add(self, case, dtype, **row):
        row = dict(case=case, dtype=dtype, **{key: value for key, value in row.items() if value is not None})
        known = case.removesuffix(WARM)
        for key, figures in dict(release=RELEASE['by_dtype'], release_gib=RELEASE['peak_gib']).items():
            if known in figures.get(dtype, ()):
                row[key] = figures[dtype][known]
        if dtype == 'bf16' and known in TARGETS:
            row['target'] = TARGETS[known]
        self.run['rows'].append(row)
        print(f'[{time.perf_counter() - self.started:5.0f} s] '
              + '  '.join(filter(None, self.cells(row))), flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps([*self.earlier, self.run], indent=1) + '\n')

    @staticmethod
    def cells(row):
        def number(value, digits=4):
            if value is None or isinstance(value, str):
                return value or ''
            return f'{value:.{digits}g}' if abs(value) < 1000 else f'{value:.0f}'

        low, middle, high = row.get('ms', (None,) * 3)
        errors = row.get('errors', {})
        grads = [value for name, value in errors.items() if name != 'output']
        worst = max(grads, key=lambda value: (math.isnan(value), value)) if grads else None
        share = row.get('copy_share')
        rate = f"{number(row['rate'])} {row['unit']}" if 'rate' in row else ''
        return [row['case'], row['dtype'], row.get('backend', ''), number(middle), number(low), number(high), rate,
                '' if share is None else f'{share:.0%}', number(row.get('peak_gib'), 3),
                number(row.get('host_us'), 3), number(row.get('torch_ms')),
                *(number(row.get('beside', {}).get(name)) for name in ('cuda', 'triton', PEER)),
                number(row.get('release')),
                number(row.get('release_gib'), 3), row.get('target', ''), number(errors.get('output'), 2),
                number(worst, 2), row.get('note') or ('WRONG' if row.get('wrong') else '')]

    def table(self):
        lines = [list(self.COLUMNS), *(self.cells(row) for row in self.run['rows'])]
        kept = [i for i in range(len(self.COLUMNS)) if any(line[i] for line in lines[1:])]
        lines = [[line[i] for i in kept] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ['-' * width for width in widths])
        return '\n'.join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def rounded(errors):
    return {key: float(f'{error:.2e}') for key, error in errors.items()}


def acceptable(errors, limit, grad_limit):
    return all(error <= (limit if name == 'output' else grad_limit) for name, error in errors.items())  # NaN is not


# Operators


def operator_case(op, shape, d_state):
    """The case of an operator's room for ``shape``, with one or two images, and how often they are repeated."""
    room, options, _ = OPERATORS[op]
    cases = import_module(f'mmvssm.kernels.{room}.cases')
    batch, dim, height, width = shape
    distinct = 2 if batch % 2 == 0 else 1
    if room == 'selective_scan':
        size = dict(length=height * width, rank=math.ceil(dim / 32), d_state=d_state)
    elif room == 'selective_scan_fn':
        size = dict(length=height * width, d_state=d_state)
    elif room == 'norm_gate':
        size = dict(rows=height * width)
    else:
        size = dict(height=height, width=width)
    return cases, cases.Case('benchmark', batch=distinct, dim=dim, **size, **options), batch // distinct


def as_in_a_block(op, tensors):
    """The memory layouts that a block of the backbones brings: halves of one product, parts of one projection."""
    tensors = dict(tensors)
    if op == 'conv_silu':
        tensors['x'] = lay_out(tensors['x'], 'half')
    elif op == 'norm_gate':
        tensors['z'] = lay_out(tensors['z'], 'half')
    elif OPERATORS[op][0] == 'selective_scan':
        sizes = [tensors[name].shape[-1] for name in ('dt', 'B', 'B')]
        parts = [tensors['dt'], tensors['B'], tensors['B'] if tensors['C'] is None else tensors['C']]
        tensors['dt'], tensors['B'], C = torch.cat(parts, -1).split(sizes, -1)
        if tensors['C'] is not None:
            tensors['C'] = C
    elif op == 'fusion':
        rank, d_state = math.ceil(tensors['x'].shape[-1] / 32), tensors['C'].shape[-1]
        tensors['C'] = torch.cat([tensors['C'].new_zeros(*tensors['C'].shape[:-1], rank + d_state), tensors['C']],
                                 -1)[..., rank + d_state:]
    return tensors


def evaluate(function, tensors, cotangents):
    """Outputs (a tuple) and gradients by name, of operators and references alike."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    wanted = {name: t for name, t in leaves.items() if t is not None}
    outputs = function(leaves)
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
    return tuple(output.detach() for output in outputs), dict(zip(wanted, grads, strict=True))


def error_of(got, expected, repeats, per_image):
    """Relative error of ``got``: of ``repeats`` copies of ``expected``, or of a sum over them."""
    if not per_image:
        expected, repeats = expected * repeats, 1
    norm = expected.norm().item()
    square = sum((part.double() - expected).square().sum().item() for part in got.chunk(repeats))
    return math.sqrt(square / repeats) / (norm or 1.0)


def order_of(op, height, width):
    """The order in which a scan walks the tokens of a map, None for that of memory."""
    return (height, width) if op in ('cross_scan', 'two_way_scan') else None


def functions_of(room, cases, case, order=None):
    """The room's operator and reference as functions of the tensors by name that return tuples."""
    if room == 'residual_conv_norm':  # its cases stack two outputs
        return lambda t: residual_conv_norm(**t), lambda t: cases.reference(case, t).unbind(0)
    if room == 'selective_scan_fn':  # float64 runs on PyTorch's operations; by steps it would take minutes
        return (lambda t: (cases.operator(case, t),),) * 2
    if room == 'selective_scan':  # likewise
        return (lambda t: (cases.operator(case, {**t, 'order': order}),),
                lambda t: (selective_scan_reference(**t, order=order, recurrence=Recurrence.apply),))
    return lambda t: (cases.operator(case, t),), lambda t: (cases.reference(case, t),)


def default_states(op):
    return 16 if op in ('scan_output', 'scan_fn') else 1


def operator_name(op, shape, d_state):
    """What rows call an operator on a shape."""
    batch, dim, height, width = shape
    return f'{op} B{batch} D{dim} {height}x{width}' + (f' N{d_state}' if d_state != 1 else '')


def beside(room, dispatch, case, operator, tensor, backend):
    """What is timed beside ``backend``, by name: a backend to ask for, and a function as of :func:`functions_of`. The
    room's other backends that run ``tensor`` unasked, but for PyTorch's operations; and ``PEER`` where it is there."""
    found = {other.name: (other.name, operator) for other in dispatch.BACKENDS
             if other.name not in (backend, 'torch') and other.why_not(tensor) is None}
    if room == 'selective_scan_fn':
        with contextlib.suppress(ImportError):
            scan = import_module(f'{PEER}.ops.selective_scan_interface').selective_scan_fn
            found[PEER] = None, lambda t: (scan(**t, delta_softplus='softplus' in case.options),)
    return found


def run_operator(report, meter, args, op, shape, dtype_name, compose, copy_rate):
    """Check, then time, one operator on one shape. Returns the medians of forward and of both passes, or None."""
    batch, dim, height, width = shape
    if op in ('conv_residual', 'conv_norm'):
        dim = dim // 2  # they are outside of the mixer
    if op == 'downsample':
        dim = 4 * dim  # it is eight times as wide as what is outside
    dtype = DTYPES[dtype_name]
    room, _, batched = OPERATORS[op]
    d_state = args.d_state or default_states(op)
    cases, case, repeats = operator_case(op, (batch, dim, height, width), d_state)
    name = operator_name(op, (batch, dim, height, width), d_state)
    operator, reference = functions_of(room, cases, case, order_of(op, height, width))

    def repeated(t):
        return t.repeat(repeats, *[1] * (t.dim() - 1))

    # Reference.
    small = cases.inputs(case, dtype, meter.device)
    small.pop('order', None)
    tensors = as_in_a_block(op, {key: repeated(t) if key in batched.split() else t for key, t in small.items()})
    wide = {key: None if t is None else t.double() for key, t in small.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        cotangents = [torch.randn(y.shape, generator=generator).to(y.device, dtype) for y in reference(wide)]
    expected, expected_grads = evaluate(reference, wide, [c.double() for c in cotangents])
    cotangents = [repeated(c) for c in cotangents]
    dispatch = import_module(f'mmvssm.kernels.{room}.dispatch')
    first, limit = next(iter(tensors.values())), OPERATOR_ERROR[dtype]
    size = sum(t.numel() * t.element_size() for t in tensors.values() if t is not None)

    def errors_of(function, expected, expected_grads):
        got, grads = evaluate(function, tensors, cotangents)
        errors = dict(output=max(error_of(*pair, repeats, True) for pair in zip(got, expected, strict=True)))
        errors.update({key: error_of(t, expected_grads[key], repeats, key in batched.split())
                       for key, t in grads.items()})
        return rounded(errors), sum(t.numel() * t.element_size() for t in got)

    with use_backend(args.backend):
        backend = choose(room, dispatch.BACKENDS, first).name
        if room == 'selective_scan_fn' and not args.backend:
            ahead = choose(room, dispatch.forward_order(dispatch.BACKENDS, first, d_state), first).name
            backend = backend if ahead == backend else f'{ahead}, {backend}'  # forward, backward
        errors, output_size = errors_of(operator, expected, expected_grads)
    if not acceptable(errors, limit, 3 * limit):
        report.add(name, dtype_name, backend=backend, errors=errors, wrong=True)
        return None
    others = {} if args.backend else beside(room, dispatch, case, operator, first, backend)
    refused, errors_beside, note_beside = {}, {}, None
    for other, (request, function) in others.items():
        try:
            with use_backend(request):
                errors_beside[other], _ = errors_of(function, expected, expected_grads)
        except RuntimeError as error:
            refused[other] = 'not run'
            note_beside = f'{other} not run: {" ".join(str(error).split())[:100]}'
        else:
            if not acceptable(errors_beside[other], limit, 3 * limit):
                refused[other] = 'WRONG'
    del expected, expected_grads, wide, small

    # Speed.
    leaves = {key: None if t is None else t.detach().requires_grad_() for key, t in tensors.items()}
    wanted = [t for t in leaves.values() if t is not None]

    def forward(function=operator):
        with torch.inference_mode():
            return function(tensors)

    def both_passes(function=operator):
        return torch.autograd.grad(function(leaves), wanted, cotangents)

    medians = []
    steps = dict(fwd=(forward, size + output_size),
                 **{'fwd+bwd': (both_passes, 3 * size + 2 * output_size)})
    for step, (function, moved) in steps.items():
        with use_backend(args.backend):
            peak = meter.peak_gib(function)
            ms = quantiles(meter.times(function, alone=True, cold=not args.warm))
            host = meter.host_us(function)
        rate = moved / ms[1] / 1e6
        torch_ms, note, ms_beside = None, None, {backend: ms[1], **refused} if others else None
        for other, (request, call) in others.items():
            if other not in refused:
                with use_backend(request):
                    ms_beside[other] = quantiles(
                        meter.times(functools.partial(function, call), alone=True, cold=not args.warm))[1]
        if compose and backend != 'torch':
            torch_ms, note = composed_ms(function, meter, alone=True, cold=not args.warm)
        report.add(f"{name} {step}{WARM if args.warm else ''}", dtype_name, backend=backend, ms=ms, rate=rate,
                   unit='GB/s', copy_share=rate / copy_rate, peak_gib=peak, host_us=round(host, 1), torch_ms=torch_ms,
                   beside=ms_beside, errors=errors, errors_beside=errors_beside or None, note=note_beside or note,
                   wrong=True if set(refused) - {PEER} else None)
        medians.append(ms[1])
    return medians


def operators(args, report, meter):
    copy_rate = report_copy(report, meter)
    for dtype in args.dtype:
        for op in args.op:
            for shape in args.shape:
                guard(report, f'{op} {shape}', dtype, run_operator, report, meter, args, op, shape, dtype,
                      not args.no_compose, copy_rate)
                meter.free()


def linear(args, report, meter):
    """Time per token as the map grows."""
    copy_rate = report_copy(report, meter)
    batch, dim = args.batch, args.dim
    for dtype in args.dtype:
        for op in args.op:
            per_token = {}
            for side in args.side:
                medians = guard(report, f'{op} {side}x{side}', dtype, run_operator, report, meter, args, op,
                                (batch, dim, side, side), dtype, False, copy_rate)
                meter.free()
                if medians:
                    per_token[side] = [ms / side**2 for ms in medians]
            first = next(iter(per_token.values()), None)
            for side, values in per_token.items():
                ratios = [round(value / start, 3) for value, start in zip(values, first, strict=True)]
                report.add(f'{op} {side}x{side}: time per token, to that at the smallest', dtype, ratios=ratios,
                           note=f'fwd {ratios[0]}, fwd+bwd {ratios[1]}'
                                + (' MORE THAN LINEAR' if max(ratios) > 1.1 else ''))


def report_copy(report, meter):
    rate = meter.copy_rate()
    report.add('copy on the device', 'int8', rate=rate, unit='GB/s')
    return rate


def guard(report, name, dtype, function, *args):
    """``function(...)``; whatever keeps a case from running is reported, and the others go on."""
    try:
        return function(*args)
    except Exception as error:
        harmless = isinstance(error, ImportError) or out_of_memory(error)
        if not harmless:
            traceback.print_exc()
        report.add(name, dtype, wrong=None if harmless else True,
                   note=f'not run: {type(error).__name__}: {" ".join(str(error).split())[:100]}')
    return None


# Models


class Classifier(nn.Module):
    """Backbone, average pooling, linear layer."""

    def __init__(self, backbone, num_classes=1000):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_channels[-1], num_classes)

    def forward(self, images):
        return self.head(self.backbone(images)[-1].mean((2, 3)))


def autocast(meter, dtype):
    return torch.autocast(meter.device.type, dtype, enabled=dtype != torch.float32)


def relative(got, expected):
    """Relative error of a list of tensors, taken together."""
    square = sum((g.double() - e.double()).square().sum().item() for g, e in zip(got, expected, strict=True))
    return math.sqrt(square / (sum(e.double().square().sum().item() for e in expected) or 1.0))


def with_gradients(model, images, meter, dtype, backend):
    """The outputs of ``model``, a list, and the gradients of all its parameters, for random cotangents."""
    with use_backend(backend):
        with autocast(meter, dtype):
            outputs = model(images)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        generator = torch.Generator().manual_seed(2)
        loss = sum((o.float() * torch.randn(o.shape, generator=generator).to(o.device)).sum() / o[0].numel()
                   for o in outputs)
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return [o.detach() for o in outputs], grads


@contextlib.contextmanager
def without_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check_model(model, images, meter, dtype, backend):
    """Errors of the eager model in eval mode, what it should return, and whether its errors are acceptable."""
    training = model.training
    model.eval()
    if any(isinstance(module, QuadMamba) for module in model.modules()):
        dtype = torch.float32  # roundings decide between windows that score alike
    with without_tf32():
        expected, expected_grads = with_gradients(model, images, meter, torch.float32, 'torch')
        got, grads = with_gradients(model, images, meter, dtype, backend)
    model.train(training)
    errors = dict(output=relative(got, expected), gradients=relative(grads, expected_grads))
    return rounded(errors), expected, acceptable(errors, *MODEL_ERROR[dtype])


def cuda_graph(function):
    """``function`` captured; calling the result replays it and returns its (static) result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result

    return replay


def default_backend(meter):
    """The backend that runs the operators unless another is asked for."""
    dispatch = import_module('mmvssm.kernels.selective_scan.dispatch')
    return choose('selective_scan', dispatch.BACKENDS, torch.empty(1, device=meter.device)).name


def before_compiling():
    """Compiled code takes random numbers as eager code does, so that the two can be compared."""
    torch._dynamo.reset()
    inductor_config.fallback_random = True


def compiled_name(mode):
    """What rows of this mode of torch.compile end with."""
    return ' compiled' + {'default': '', 'reduce-overhead': ', CUDA graphs'}[mode]


def drop_gradients(parameters):
    """As ``zero_grad`` does, without a search of the modules, which takes milliseconds."""
    for parameter in parameters:
        parameter.grad = None


def gradients_of(call, model):
    """The gradients of ``model`` after ``call()``, with the same random numbers each time."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    call()
    return [p.grad.clone() for p in model.parameters()]


def run_model(report, meter, args, model_name, dtype_name):
    """Check a classifier, then time it in every mode."""
    family, arch = ARCHS[model_name]
    (height, width), batch = args.size, args.batch
    torch.manual_seed(0)
    model = Classifier(family(args.arch or arch, out_indices=(3,))).to(
        meter.device, memory_format=torch.channels_last)
    few = torch.randn(2 if batch % 2 == 0 else 1, 3, height, width, device=meter.device)
    errors, (logits,), fine = check_model(model, few, meter, DTYPES[dtype_name], args.backend)
    for mode in sorted(args.mode):  # inference first, since training changes the statistics of batches
        name = f'{model_name} B{batch} {height}x{width} {mode}'
        if not fine:
            report.add(name, dtype_name, errors=errors, wrong=True, backend=args.backend or default_backend(meter))
            continue
        guard(report, name, dtype_name, time_model, report, meter, args, model, few, logits, mode, name, dtype_name,
              errors)
        meter.free()


def time_model(report, meter, args, model, few, logits, mode, name, dtype_name, errors):
    """Time a classifier: as it is and, where asked for, compiled and replayed from a CUDA graph. ``logits``: its right
    ones for the images ``few``."""
    dtype, batch, is_quadmamba = DTYPES[dtype_name], args.batch, isinstance(model.backbone, QuadMamba)
    images = few.repeat(batch // len(few), 1, 1, 1)  # so that every result is known
    if mode == 'train':
        images = torch.randn_like(images)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=meter.device) % 1000
    common = dict(backend=args.backend or default_backend(meter), unit='img/s')
    model.train(mode == 'train')
    parameters = list(model.parameters())

    def infer(net):
        with torch.inference_mode(), autocast(meter, dtype):
            return net(images)

    def train(net):
        drop_gradients(parameters)
        with autocast(meter, dtype):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()

    def check_call(step, is_compiled):
        """The errors, those of the very call that is timed included where they are known, and whether they are
        acceptable."""
        if mode == 'infer':
            found = step()
            if is_quadmamba:  # see check_model
                return errors, bool(found.isfinite().all())
            wanted = logits.repeat(batch // len(few), 1)
            found = rounded(dict(errors, output=max(errors['output'], relative([found], [wanted]))))
            return found, acceptable(found, *MODEL_ERROR[dtype])
        gradients = gradients_of(step, model)
        fine = all(bool(g.isfinite().all()) for g in gradients)
        if not is_compiled or is_quadmamba:
            return errors, fine
        error = relative(gradients, gradients_of(lambda: train(model), model))
        return rounded(dict(errors, compiled=error)), fine and error <= COMPILED_ERROR[dtype]

    call = infer if mode == 'infer' else train

    def variants():
        if args.eager or not args.compile:
            yield '', lambda: call(model)
        if args.cuda_graph and meter.cuda and mode == 'infer':
            yield ' CUDA graph', cuda_graph(lambda: call(model))
        for compile_mode in args.compile:
            before_compiling()
            net = torch.compile(model, fullgraph=True, mode=compile_mode)
            yield compiled_name(compile_mode), functools.partial(call, net)

    with use_backend(args.backend):
        for suffix, step in variants():
            start = time.perf_counter()
            found, fine = check_call(step, 'compiled' in suffix)
            note = f'compiled in {time.perf_counter() - start:.0f} s' if 'compiled' in suffix else None
            if not fine:
                report.add(name + suffix, dtype_name, errors=found, wrong=True, backend=common['backend'])
                continue
            model.zero_grad(set_to_none=True)
            ms = quantiles(meter.times(step, seconds=3 * meter.seconds))
            peak, host = meter.peak_gib(step) if 'CUDA graph' not in suffix else None, meter.host_us(step, 3)
            torch_ms = None
            if args.compare and not suffix:
                torch_ms, note = composed_ms(step, meter)
            report.add(name + suffix, dtype_name, **common, ms=ms, rate=1e3 * batch / ms[1], peak_gib=peak,
                       host_us=round(host), torch_ms=torch_ms, errors=found, note=note)
            del step
            meter.free()


def models(args, report, meter):
    for name in args.model:
        for dtype in args.dtype:
            guard(report, f'{name} B{args.batch}', dtype, run_model, report, meter, args, name, dtype)
            meter.free()


# Detectors and segmentors in training


def load_config(name):
    """A config of this repository, its backbone from scratch."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py', import_custom_modules=False)
    cfg.model.backbone.init_cfg = None
    import_modules(cfg)
    init_default_scope(cfg.default_scope)
    return cfg


def slim(cfg, arch):
    """Another arch for the backbone, with what follows it."""
    if arch:
        cfg.model.backbone.arch = arch
        widths = [arch['embed_dims'] * 2**i for i in range(4)]
        if 'neck' in cfg.model:
            cfg.model.neck.in_channels = widths
        else:
            cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = widths, widths[2]
    return cfg


def mask_rcnn(variant, args, device):
    """A Mask R-CNN and the function that returns its losses for random images, boxes and masks on the device."""
    cfg = slim(load_config(f'mask_rcnn_{variant}_1x'), args.arch)
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData
    model = MODELS.build(cfg.model)
    model.init_weights()
    keep_boxes_fp32(model)
    batch, height, width = args.detection
    generator = torch.Generator().manual_seed(0)
    images, samples = torch.randn(batch, 3, height, width, generator=generator).to(device), []
    shape = (height, width)
    for _ in range(batch):
        corners = torch.rand(20, 2, 2, generator=generator).sort(1)[0]
        boxes = (corners * torch.tensor([width, height])).flatten(1)
        boxes[:, 2:] = torch.minimum(boxes[:, 2:] + 16, torch.tensor([width, height]))
        masks = np.zeros((len(boxes), height, width), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        instances = InstanceData(bboxes=boxes, labels=torch.randint(80, (len(boxes),), generator=generator),
                                 masks=BitmapMasks(masks, height, width))
        sample = DetDataSample(gt_instances=instances, metainfo=dict(
            img_shape=shape, ori_shape=shape, batch_input_shape=shape, pad_shape=shape, scale_factor=(1., 1.)))
        samples.append(sample.to(device))
    return model, images, samples


def upernet(variant, args, device):
    """A UPerNet and random images and label maps on the device."""
    cfg = slim(load_config(f'upernet_{variant}_160k'), args.arch)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    batch, height, width = args.segmentation
    generator = torch.Generator().manual_seed(0)
    images, samples = torch.randn(batch, 3, height, width, generator=generator).to(device), []
    shape = (height, width)
    for _ in range(batch):
        labels = torch.randint(150, (1, height, width), generator=generator)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(
            img_shape=shape, ori_shape=shape, pad_shape=shape))
        samples.append(sample.to(device))
    return model, images, samples


TASKS = dict(mask_rcnn=mask_rcnn, upernet=upernet)


def run_dense(report, meter, args, task, model_name, dtype_name):
    """Check the backbone of a detector or segmentor, then time the whole's training step and the backbone's passes,
    with the backbone as it is and compiled."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    model, images, samples = TASKS[task](model_name.replace('-', '_'), args, meter.device)
    model.to(meter.device).train()
    name = f"{task} {model_name} {'x'.join(map(str, (len(images), *images.shape[2:])))}"
    common = dict(backend=args.backend or default_backend(meter), unit='img/s')
    errors, _, fine = check_model(model.backbone, images[:1], meter, dtype, args.backend)
    if not fine:
        report.add(name, dtype_name, errors=errors, wrong=True, backend=common['backend'])
        return

    def total(value):
        """The sum of all losses in what a model's ``loss`` returns."""
        if isinstance(value, dict):
            return sum(total(item) for key, item in value.items() if 'loss' in key)
        return sum(map(total, value)) if isinstance(value, (list, tuple)) else value.mean()

    parameters, of_backbone = list(model.parameters()), list(model.backbone.parameters())

    def train():
        drop_gradients(parameters)
        with autocast(meter, dtype):
            loss = total(model.loss(images, samples))
        loss.backward()
        return loss.detach()

    def backbone_passes():
        drop_gradients(of_backbone)
        with autocast(meter, dtype):
            loss = sum(output.float().mean() for output in model.backbone(images))
        loss.backward()

    def backbone_forward():
        with torch.no_grad(), autocast(meter, dtype):
            return model.backbone(images)

    def time_parts(suffix, parts, row, note=None):
        for part, call in parts.items():
            ms = quantiles(meter.times(call, seconds=3 * meter.seconds))
            model.zero_grad(set_to_none=True)
            peak = meter.peak_gib(call) if 'CUDA graph' not in suffix else None
            report.add(f'{name} {part}{suffix}', dtype_name, **common, ms=ms, rate=1e3 * len(images) / ms[1],
                       peak_gib=peak, host_us=round(meter.host_us(call, 3)), errors=row, note=note)

    for compile_mode in [None] * (args.eager or not args.compile) + args.compile:
        note, row, suffix = None, errors, compiled_name(compile_mode) if compile_mode else ''
        with use_backend(args.backend):
            loss = train().item()
            fine = math.isfinite(loss)
            if suffix:
                expected = gradients_of(backbone_passes, model.backbone)
                before_compiling()
                model.backbone.compile(fullgraph=True, mode=compile_mode)
                start = time.perf_counter()
                error = relative(gradients_of(backbone_passes, model.backbone), expected)
                note = f'backbone compiled in {time.perf_counter() - start:.0f} s'
                row, fine = rounded(dict(errors, compiled=error)), fine and error <= COMPILED_ERROR[dtype]
                del expected
            if not fine:
                report.add(f'{name} train{suffix}', dtype_name, errors=dict(row, loss=loss), wrong=True)
                continue
            parts = {'train': train, 'backbone fwd+bwd': backbone_passes}
            if not suffix:
                parts['backbone fwd'] = backbone_forward
            time_parts(suffix, parts, row, note)
            if not suffix and args.with_cp:
                expected = gradients_of(backbone_passes, model.backbone)
                model.backbone.checkpointed_stages = frozenset(range(model.backbone.num_stages))
                error = relative(gradients_of(backbone_passes, model.backbone), expected)
                del expected
                row = rounded(dict(errors, with_cp=error))
                if error <= WITH_CP_ERROR:
                    time_parts(', with_cp', {'train': train}, row)
                else:
                    report.add(f'{name} train, with_cp', dtype_name, errors=row, wrong=True)
                model.backbone.checkpointed_stages = frozenset()


def dense(args, report, meter):
    for task in args.task:
        for name in args.model:
            for dtype in args.dtype:
                guard(report, f'{task} {name}', dtype, run_dense, report, meter, args, task, name, dtype)
                meter.free()


# Runs of tools/train.py


def training_log(work_dir):
    """What the latest run in a work dir logged: rows of iterations, results of evaluations, and its config."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not logs:
        raise SystemExit(f'error: {work_dir} has no */vis_data/scalars.json: no work dir of tools/train.py')
    lines = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    results = {key: value for line in lines if 'loss' not in line for key, value in line.items()
               if key.endswith(('mAP', 'mIoU', 'top1'))}
    cfg = Config.fromfile(next(logs[-1].parent.glob('config.py')), import_custom_modules=False)
    return [line for line in lines if 'loss' in line], results, cfg


def dtype_of(cfg):
    return {'bfloat16': 'bf16', 'float16': 'fp16'}.get(cfg.optim_wrapper.get('dtype'), 'fp32')


def training(args, report, meter):
    """What the log of a training run says of its result, speed and memory."""
    steps, results, cfg = training_log(args.work_dir)
    ms = quantiles([1e3 * line['time'] for line in steps[1:] or steps])
    memory = max((line.get('memory', 0) for line in steps), default=0)
    batch = cfg.train_dataloader.batch_size
    report.add(f'training of {args.work_dir.name}', dtype_of(cfg), ms=ms, unit='img/s', rate=1e3 * batch / ms[1],
               peak_gib=memory / 1024 or None, results=results, batch=batch, iterations=steps[-1]['step'],
               note=', '.join(f'{key} {value:.3f}' for key, value in results.items()))


# Command line


def everything(args, report, meter):
    """What the project is measured by, the most telling first."""
    def part(command, function, *options):
        function(parse_args([command, *args.passed_on, *options]), report, meter)

    part('models', models, '--model', 'spatialmamba-t')
    part('ops', operators, '--shape', '128,128,56,56', '2,128,200,336')
    part('dense', dense)
    part('models', models, '--model', 'spatialmamba-s', 'spatialmamba-b')
    part('models', models, '--model', 'quadmamba-li', 'quadmamba-t', 'quadmamba-s', 'quadmamba-b')
    part('ops', operators, '--op', 'cross_scan', '--shape', '128,768,14,14', '--no-compose')
    part('ops', operators, '--op', 'two_way_scan', '--shape', '128,192,56,56', '--no-compose')
    part('ops', operators, '--op', 'scan_fn', '--shape', '8,768,64,64', '128,384,14,14', '--no-compose')
    part('models', models, '--model', 'spatialmamba-t', '--compile', 'default', 'reduce-overhead', '--no-eager')
    part('dense', dense, '--task', 'mask_rcnn', '--compile', 'default', 'reduce-overhead', '--no-eager')
    part('ops', operators, '--shape', '128,256,28,28', '128,512,14,14', '128,1024,7,7', '--no-compose')


def numbers(count, separator=','):
    """An argparse type: ``count`` whole numbers with ``separator`` between them."""

    def parse(text):
        try:
            values = tuple(int(part) for part in text.split(separator))
        except ValueError:
            values = ()
        if len(values) != count or min(values) < 1:
            raise argparse.ArgumentTypeError(f'expected {count} whole numbers with {separator!r} between them, got '
                                             f'{text!r}')
        return values

    return parse


def arch_of(text):
    """An argparse type: EMBED_DIMS,DEPTH,DEPTH,DEPTH,DEPTH as a backbone's ``arch``."""
    embed_dims, *depths = numbers(5)(text)
    return dict(embed_dims=embed_dims, depths=depths)


def parse_args(argv=None):
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    common.add_argument('--backend', help='of the operators; without it the fastest that can run')
    common.add_argument('--seconds', type=float, default=0.3,
                        help='for which an operator is timed, models three times as long (default 0.3)')
    common.add_argument('--out', type=Path, help='append the run to this .json file')
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, function, help, dtypes=('bf16',)):
        sub = commands.add_parser(name, parents=[common], help=help)
        sub.set_defaults(function=function)
        if dtypes:
            sub.add_argument('--dtype', nargs='+', choices=tuple(DTYPES), default=list(dtypes))
        return sub

    def operator_options(sub):
        sub.add_argument('--warm', action='store_true', help='do not empty the level-2 cache between calls')
        sub.add_argument('--d-state', type=int, help='states (default 1; 16 for scan_output and scan_fn)')

    sub = command('ops', operators, 'operators, forward and with backward, beside the same of PyTorch operations')
    sub.add_argument('--op', nargs='+', choices=tuple(OPERATORS), default=list(SPATIAL_MAMBA_OPERATORS))
    sub.add_argument('--shape', nargs='+', type=numbers(4), default=list(SHAPES), metavar='BATCH,D,H,W')
    sub.add_argument('--no-compose', action='store_true', help="leave out PyTorch's operations")
    operator_options(sub)

    sub = command('linear', linear, 'time per token of operators as the map grows')
    sub.add_argument('--op', nargs='+', choices=tuple(OPERATORS),
                     default=['scan', 'fusion', 'conv_silu', 'norm_gate'])
    sub.add_argument('--side', nargs='+', type=int, default=list(LINEAR_SIDES))
    sub.add_argument('--batch', type=int, default=64, help='default 64, which keeps a GPU busy with the smallest map')
    sub.add_argument('--dim', type=int, default=128)
    operator_options(sub)

    def model_options(sub):
        sub.add_argument('--model', nargs='+', choices=tuple(ARCHS), default=['spatialmamba-t'])
        sub.add_argument('--compile', nargs='*', choices=('default', 'reduce-overhead'), metavar='MODE',
                         help='time it with torch.compile as well, in these modes of it: default, and '
                              'reduce-overhead, which has CUDA graphs')
        sub.add_argument('--no-eager', dest='eager', action='store_false', help='with --compile: that alone')
        sub.add_argument('--arch', type=arch_of, metavar='WIDTH,DEPTHS',
                         help='instead of the published one, e.g. 16,1,1,1,1')

    sub = command('models', models, 'classifiers: inference, and forward with backward')
    model_options(sub)
    sub.add_argument('--batch', type=int, default=128)
    sub.add_argument('--size', nargs=2, type=int, default=[224, 224], metavar=('HEIGHT', 'WIDTH'))
    sub.add_argument('--mode', nargs='+', choices=('infer', 'train'), default=['infer', 'train'])
    sub.add_argument('--cuda-graph', action='store_true', help='time inference replayed from a CUDA graph as well')
    sub.add_argument('--compare', action='store_true', help="time the operators of PyTorch's operations as well")

    sub = command('dense', dense, 'forward with backward of Mask R-CNN and UPerNet; compiled: their backbones')
    model_options(sub)
    sub.add_argument('--task', nargs='+', choices=tuple(TASKS), default=list(TASKS))
    sub.add_argument('--detection', type=numbers(3, 'x'), default=(2, 800, 1344), metavar='BATCHxHxW')
    sub.add_argument('--with-cp', action='store_true', help='with gradient checkpointing of all stages as well')
    sub.add_argument('--segmentation', type=numbers(3, 'x'), default=(16, 512, 512), metavar='BATCHxHxW')

    sub = command('training', training, 'result, speed and memory of a run of tools/train.py', dtypes=())
    sub.add_argument('work_dir', type=Path)

    command('all', everything, 'the published table: a choice of the others', dtypes=())
    args = parser.parse_args(argv)
    if hasattr(args, 'compile'):
        args.compile = ['default'] if args.compile == [] else args.compile or []
    args.passed_on = [f'--device={args.device}', f'--seconds={args.seconds}']
    args.passed_on += [f'--backend={args.backend}'] if args.backend else []
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel('WARNING')
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)  # events are recorded on the current one
    report = Report(describe_system(args.device, argv), args.out)
    print(', '.join(f'{key} {value}' for key, value in report.run['system'].items()), flush=True)
    try:
        args.function(args, report, Meter(args.device, args.seconds))
    finally:
        print(report.table())
    return 1 if report.wrong else 0


if __name__ == '__main__':
    sys.exit(main())

"""CPU speed as ratios in one process: the backbones to MMPretrain's Swin-T on the same input, the selective scans
to their step-by-step references. Checks a scan against the reference before it times it."""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import mmvssm
from mmvssm.kernels import (
    selective_scan,
    selective_scan_fn,
    selective_scan_fn_reference,
    selective_scan_reference,
)
from mmvssm.models.backbones import QuadMamba, SpatialMamba

#: backbone, arch, image shape, training step instead of inference, repeats, highest ratio allowed
MODEL_CASES = (
    (SpatialMamba, 'tiny', (1, 3, 224, 224), False, 21, 1.3),
    (SpatialMamba, 'tiny', (1, 3, 800, 1216), False, 7, 1.0),
    (SpatialMamba, 'tiny', (4, 3, 224, 224), True, 9, 1.6),
    (QuadMamba, 'small', (1, 3, 224, 224), False, 21, 1.6),
)
SCAN_LENGTH, SCAN_DIM, SCAN_FN_STATES, SCAN_SPEEDUP = 3136, 128, 16, 10


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, help='write the rows to this .json file as well')
    return parser.parse_args()


def alternate(functions, repeats):
    """Seconds of each call, the functions taking turns so that drifts of the machine meet all alike."""
    times = [[] for _ in functions]
    for i in range(repeats + 1):
        for record, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if i:  # the first round warms up
                record.append(time.perf_counter() - start)
    return times


def row(name, ours, theirs, limit, baseline):
    def quantiles(times):
        low, middle, high = statistics.quantiles(times, n=4)
        return [round(1e3 * t, 3) for t in (low, middle, high)]

    ours_ms, theirs_ms = 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs)
    ratio = ours_ms / theirs_ms
    print(f'{name:52} {ours_ms:9.2f} ms  {baseline} {theirs_ms:9.2f} ms  ratio {ratio:6.3f}  {limit}', flush=True)
    return dict(case=name, baseline=baseline, ms_quartiles=quantiles(ours),
                baseline_ms_quartiles=quantiles(theirs), ratio=round(ratio, 4), limit=limit)


def model_rows():
    from mmpretrain.models import SwinTransformer
    swin = SwinTransformer('tiny', img_size=224, out_indices=(0, 1, 2, 3))
    for family, arch, shape, training, repeats, limit in MODEL_CASES:
        torch.manual_seed(0)
        ours, image = family(arch), torch.randn(shape)

        def run(model, image=image, training=training):
            model.train(training)
            with torch.inference_mode(not training):
                loss = sum(f.mean() for f in model(image))
            if training:
                model.zero_grad()
                loss.backward()

        times = alternate([lambda run=run, ours=ours: run(ours), lambda run=run: run(swin)], repeats)
        batch, _, height, width = shape
        name = (f"{family.__name__} {arch} {'training step' if training else 'inference'} {height}x{width} "
                f'batch {batch}')
        yield row(name, *times, f'must be <= {limit}', 'Swin-T')


def scan_rows():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    L, D, N = SCAN_LENGTH, SCAN_DIM, SCAN_FN_STATES
    x, dt, B = normal(1, L, D), normal(1, L, 4), normal(1, L, 1)
    A, weight, bias = normal(D, 1), normal(D, 4), normal(D)
    yield from rows_of_scan(
        f'scan L={L} D={D}', lambda scan: scan(x, dt, -A.exp(), B, dt_weight=weight, dt_bias=bias),
        (x, dt, B, A, weight, bias), selective_scan, selective_scan_reference)
    leaves = (normal(1, D, L), normal(1, D, L), normal(D, N), normal(1, N, L), normal(1, N, L), normal(D))
    u, delta, A_fn, B_fn, C, skip = leaves
    yield from rows_of_scan(
        f'scan_fn L={L} D={D} N={N}', lambda scan: scan(u, delta, -A_fn.exp(), B_fn, C, skip, delta_softplus=True),
        leaves, selective_scan_fn, selective_scan_fn_reference)


def rows_of_scan(name, call, leaves, scan, reference):
    """``call(scan)`` beside ``call(reference)``, forward, and with the gradients of ``leaves``."""

    def run(function, backward):
        y = call(function)
        if backward:
            for leaf in leaves:
                leaf.grad = None
            y.square().sum().backward()
        return y

    with torch.no_grad():
        ours, expected = run(scan, False), run(reference, False)
    error = float((ours - expected).norm() / expected.norm())
    if not error <= 1e-5:
        sys.exit(f'error: {name} differs from its reference by {error:.2e}; no speed is reported')
    for backward in (False, True):
        with torch.set_grad_enabled(backward):
            fast = alternate([lambda b=backward: run(scan, b)], 50)[0]
            slow = alternate([lambda b=backward: run(reference, b)], 5)[0]
        yield row(f"{name} {'forward + backward' if backward else 'forward'}", fast, slow,
                  f'must be <= {1 / SCAN_SPEEDUP}', 'steps')


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    from mmvssm.kernels._core.extension import why_not_loaded
    reason = why_not_loaded()
    if reason:
        print(f'note: {reason}')
    system = dict(cpu=platform.processor() or platform.machine(), threads=args.threads,
                  isa=None if reason else torch.ops.mmvssm_cpu.isa(), torch=torch.__version__,
                  python=platform.python_version(), mmvssm=mmvssm.__version__, command=' '.join(sys.argv))
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        system['cpu'] = next((line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines()
                              if line.startswith('model name')), system['cpu'])
    print(', '.join(f'{key} {value}' for key, value in system.items()))
    rows = [*scan_rows(), *model_rows()]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(system=system, rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    main()

"""What test_distributed.py runs in two processes, started by torchrun; results go to the folder that is given."""
import copy
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODEL_WRAPPERS, MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from mmengine.visualization import Visualizer

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1))
WIDTHS = [8, 16, 32, 64]


def load(name, **backbone):
    """A shipped config with a few channels."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py', import_custom_modules=False)
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(arch=SMALL, init_cfg=None, drop_path_rate=0., **backbone)
    model = cfg.model
    if cfg.default_scope == 'mmpretrain':
        model.head.update(in_channels=WIDTHS[-1], num_classes=5)
        model.data_preprocessor.num_classes = 5
    elif cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (64, 64)
        norm = dict(type='BN')  # SyncBN needs a GPU
        model.decode_head.update(in_channels=WIDTHS, channels=8, num_classes=5, norm_cfg=norm, dropout_ratio=0)
        model.auxiliary_head.update(in_channels=WIDTHS[2], channels=8, num_classes=5, norm_cfg=norm, dropout_ratio=0)
    else:
        cfg.merge_from_dict({
            'model.neck.in_channels': WIDTHS, 'model.neck.out_channels': 8,
            'model.rpn_head.in_channels': 8, 'model.rpn_head.feat_channels': 8,
            'model.train_cfg.rpn_proposal.max_per_img': 16, 'model.train_cfg.rcnn.sampler.num': 16,
            'model.roi_head.bbox_roi_extractor.out_channels': 8, 'model.roi_head.bbox_head.in_channels': 8,
            'model.roi_head.bbox_head.fc_out_channels': 16, 'model.roi_head.mask_roi_extractor.out_channels': 8,
            'model.roi_head.mask_head.in_channels': 8, 'model.roi_head.mask_head.conv_out_channels': 8,
            'model.roi_head.mask_head.num_convs': 1})
    return cfg


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def wrap(cfg, model):
    return MODEL_WRAPPERS.build(dict(cfg.model_wrapper_cfg, device_ids=None, module=model))


def batch(cfg, count, seed, objects=2):
    """``count`` random images as a data loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(count)]
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample
        labels = torch.randint(5, (count,), generator=generator)
        return dict(inputs=torch.stack(inputs), data_samples=[DataSample().set_gt_label(int(i)) for i in labels])
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        samples = []
        for _ in inputs:
            labels = torch.randint(5, (1, 64, 64), generator=generator)
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=(64, 64))))
        return dict(inputs=inputs, data_samples=samples)
    from mmdet.testing import demo_mm_inputs
    data = demo_mm_inputs(count, [(3, 64, 64)] * count, num_items=[objects] * count, num_classes=80, with_mask=True)
    return dict(data, inputs=inputs)


def part(data, rank):
    half = len(data['data_samples']) // 2
    return {key: value[rank * half:(rank + 1) * half] for key, value in data.items()}


def losses_of(model, data):
    preprocessor = getattr(model, 'module', model).data_preprocessor
    losses = model(**preprocessor(data, True), mode='loss')
    return getattr(model, 'module', model).parse_losses(losses)[0]


def gradients(name, **backbone):
    """The greatest difference to a gradient of one process on both ranks' images, relative to its greatest entry."""
    cfg = load(name, **backbone)
    if cfg.default_scope == 'mmpretrain':
        cfg.model.train_cfg = None  # no mixed images
    model = build(cfg).eval()
    alone, wrapped, worst = copy.deepcopy(model), wrap(cfg, model), 0.
    for seed in range(2):
        data = batch(cfg, 4, seed)
        alone.zero_grad()
        wrapped.zero_grad()
        losses_of(alone, copy.deepcopy(data)).backward()
        losses_of(wrapped, part(data, dist.get_rank())).backward()
        least = 1e-3 * max(p.grad.abs().max() for p in alone.parameters())
        for expected, got in zip(alone.parameters(), model.parameters(), strict=True):
            worst = max(worst, float((expected.grad - got.grad).abs().max() / (expected.grad.abs().max() + least)))
    return worst


def trained(name, objects=(2, 2, 2), accumulate=1, mesa=False, wrapper=None, **backbone):
    """Whether a few steps leave both ranks with the same finite weights, other than those at the start.

    ``objects``: in an image of rank 1 at each step; rank 0 has 2.
    """
    cfg = load(name, **backbone)
    model = build(cfg).train()
    before = flat(model)
    cfg.model_wrapper_cfg.update(wrapper or {})
    wrapped = wrap(cfg, model)
    cfg.optim_wrapper.update(accumulative_counts=accumulate)
    optimizer = build_optim_wrapper(wrapped, cfg.optim_wrapper)
    optimizer.initialize_count_status(wrapped, 0, len(objects))
    rank = dist.get_rank()
    torch.manual_seed(rank)
    for step, count in enumerate(objects):
        if mesa and step:  # begins later in training
            model.teacher, model.mesa_weight = lambda inputs: torch.full((len(inputs), 5), 0.2), 1.
        wrapped.train_step(batch(cfg, 2, 10 * step + rank, count if rank else 2), optimizer)
    weights = flat(model)
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    return dict(equal=torch.equal(*both), finite=bool(weights.isfinite().all()), moved=not torch.equal(weights, before))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@DATASETS.register_module()
class Rows(torch.utils.data.Dataset):
    """Random images with label maps, by number."""

    metainfo = dict(classes=tuple('abcde'), palette=[[i] * 3 for i in range(5)])

    def __len__(self):
        return 16

    def __getitem__(self, i):
        data = batch(self.cfg, 1, seed=i)
        return {key: value[0] for key, value in data.items()}


def run(folder, iterations, fsdp=False, resume=None):
    """Train UPerNet with MMEngine's runner; returns it."""
    for kind in (MMLogger, MessageHub, Visualizer):
        kind._instance_dict.clear()  # of the run before
    cfg = load('upernet_spatialmamba_t_160k')
    Rows.cfg = cfg
    if fsdp:
        cfg.merge_from_dict(Config.fromfile(CONFIGS / '_base_' / 'fsdp.py').to_dict())
        # On CPUs there is nothing to bring to the CPU, and PyTorch crashes if asked to.
        cfg.strategy.model_wrapper.device_id = 'cpu'
        cfg.strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT', state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True))
    cfg.model_wrapper_cfg.device_ids = None
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator', 'test_cfg', 'test_dataloader', 'test_evaluator'):
        cfg[key] = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
    cfg.train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='Rows'),
                                sampler=dict(type='InfiniteSampler', shuffle=False))
    cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=-1)
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=iterations)]
    # Not AdamW: on CPUs PyTorch writes its two averages to the same memory when it collects them for a checkpoint.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    cfg.optim_wrapper.paramwise_cfg = dict(norm_decay_mult=0., layer_decay_rate=0.9)
    cfg.work_dir, cfg.launcher, cfg.randomness = str(folder), 'pytorch', dict(seed=0)
    cfg.resume, cfg.load_from = bool(resume), resume and str(resume)
    runner = RUNNERS.build(cfg) if fsdp else Runner.from_cfg(cfg)
    runner.train()
    return runner


def fsdp(folder):
    """Weights after training by FSDP, without and with an interruption, and by DDP."""
    whole = run(folder / 'whole', 4, fsdp=True)
    run(folder / 'resumed', 4, fsdp=True, resume=folder / 'whole' / 'iter_2.pth')
    plain = run(folder / 'plain', 4)
    dist.barrier()
    first, resumed, ddp = (torch.load(folder / name / 'iter_4.pth', weights_only=False)
                           for name in ('whole', 'resumed', 'plain'))
    model = build(load('upernet_spatialmamba_t_160k'))
    model.load_state_dict(first['state_dict'])  # whole weights, by a plain model
    start = torch.load(folder / 'whole' / 'iter_2.pth', weights_only=False)['state_dict']
    return dict(
        resumed=all(torch.equal(value, resumed['state_dict'][name]) for name, value in first['state_dict'].items()),
        like_ddp=max(float((p - ddp['state_dict'][name]).detach().abs().max()) for name, p in model.named_parameters()),
        moved=max(float((p - start[name]).detach().abs().max()) for name, p in model.named_parameters()),
        share=sum(p.numel() for p in whole.model.parameters()) / sum(p.numel() for p in plain.model.parameters()),
        rates=[sorted({group['lr'] for group in runner.optim_wrapper.optimizer.param_groups})
               for runner in (whole, plain)],
        base_lr=[checkpoint['optimizer']['base_param_settings']['lr'] for checkpoint in (first, resumed, ddp)])


SPATIAL, QUAD = 'spatialmamba_t', 'quadmamba_t'
CHECKS = {
    'gradients-classifier': lambda: gradients(f'{SPATIAL}_in1k'),
    'gradients-classifier-quadmamba-with_cp': lambda: gradients(f'{QUAD}_in1k', with_cp=(0, 1)),
    'gradients-upernet': lambda: gradients(f'upernet_{SPATIAL}_160k'),
    'trained-classifier-mesa': lambda: trained(f'{SPATIAL}_in1k', mesa=True),
    'trained-upernet-quadmamba-with_cp': lambda: trained(f'upernet_{QUAD}_160k', with_cp=True),
    'trained-upernet-accumulated': lambda: trained(f'upernet_{SPATIAL}_160k', (2,) * 4, accumulate=2,
                                                   wrapper=dict(static_graph=False)),
    'trained-mask_rcnn': lambda: trained(f'mask_rcnn_{SPATIAL}_1x'),
    'trained-mask_rcnn-compiled': lambda: trained(f'mask_rcnn_{SPATIAL}_1x', compile=dict(backend='aot_eager')),
    'trained-mask_rcnn-empty-at-first': lambda: trained(f'mask_rcnn_{SPATIAL}_1x', (0, 2, 0), with_cp=(0, 1)),
    'trained-mask_rcnn-quadmamba-empty-later': lambda: trained(f'mask_rcnn_{QUAD}_1x', (2, 0, 2), with_cp=True),
    'fsdp': lambda: fsdp(Path(sys.argv[1])),
}


def main():
    import gloo_on_cpu  # noqa: F401
    results = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = traceback.format_exc()
    (Path(sys.argv[1]) / f'rank{dist.get_rank()}.json').write_text(json.dumps(results))


if __name__ == '__main__':
    main()

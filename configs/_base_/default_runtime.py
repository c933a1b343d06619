# Hooks, logs, visualizer and `default_scope` of MMDetection; the three newest checkpoints and the best are kept.
_base_ = ['mmdet::_base_/default_runtime.py', './ddp.py']

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))

# Seconds. What one GPU does while the others wait takes far less: COCO's evaluation a few minutes, a checkpoint less.
env_cfg = dict(dist_cfg=dict(timeout=600))

# Hooks, logs, visualizer and `default_scope` of MMPretrain; the three newest checkpoints and the best are kept.
_base_ = ['mmpretrain::_base_/default_runtime.py', './ddp.py']

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto'),
    # The authors' checkpoints, which hooks would not know; see mmvssm.models.classifiers.
    authors_checkpoint=dict(type='AuthorsCheckpointHook'))
env_cfg = dict(dist_cfg=dict(timeout=600))  # seconds, see default_runtime.py

# Parameters, gradients and AdamW's state are shared among the GPUs, block by block, for models too large for one.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='ResumableFSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', auto_wrap_policy='wrap_blocks', use_orig_params=True),
    # Whole weights, as in any other checkpoint.
    state_dict_cfg='full')

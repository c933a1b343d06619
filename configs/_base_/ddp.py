# How gradients are exchanged between GPUs; without --launcher nothing of this is used.
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel',
    # Every parameter takes part in every step; nothing has to be searched.
    find_unused_parameters=False,
    # The same way each time. PyTorch cannot learn that from a step without an exchange: where gradients are
    # accumulated (optim_wrapper.accumulative_counts) this must be False.
    static_graph=True,
    # Gradients lie where they are exchanged, which saves their copy.
    gradient_as_bucket_view=True,
    # Only BatchNorms have buffers that change; each GPU keeps its own, or the layers exchange them (SyncBN).
    broadcast_buffers=False)

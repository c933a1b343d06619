"""A hook for a config's ``custom_imports``."""
import atexit
import os
import signal
import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class TerminateHook(Hook):
    """Ask the second of several processes to stop, after the third iteration.

    The first takes a second to save; a process that does not wait for it leaves ``left_early`` in the work dir.
    """

    def before_train(self, runner):
        folder = Path(runner.work_dir)
        atexit.register(lambda: None if (folder / 'stopped').exists() else (folder / 'left_early').touch())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.rank, runner.iter) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    def before_save_checkpoint(self, runner, checkpoint):
        time.sleep(1)

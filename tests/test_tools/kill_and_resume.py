"""Kill a training at random moments, start it again each time, and compare its final state with that of a run that was
left alone, bit by bit.

    python tests/test_tools/kill_and_resume.py --kills 20

Kills are by SIGKILL, often while a checkpoint is saved, which happens after every iteration here, and by SIGTERM to all
processes, after which the run has to save, exit with status 143 and go on without being told to. `test_safety.py` does
the same with few kills. Prints a line for each kill; exit status 0 if all were survived, the weights, optimizer,
schedules and averaged weights are the same, and no process is left.
"""
import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_repeatable import Case, differing
from tool_testing import ROOT

OPTIONS = ['default_hooks.logger.interval=20', 'default_hooks.checkpoint.interval=1',
           'train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True',
           'val_dataloader.num_workers=1', 'val_dataloader.persistent_workers=True']
#: Seconds that the workers of a run that was killed have to notice it.
NOTICED = 30


def start(case, work_dir, iterations, *arguments):
    command = [sys.executable, 'tools/train.py', str(case.config), '--work-dir', str(case.folder / work_dir), '--seed',
               '3', '--deterministic', *arguments, '--cfg-options', f'data_root={case.folder / "data"}/', *OPTIONS,
               f'train_cfg.max_iters={iterations}', 'train_cfg.val_interval=5']
    log = open(case.folder / f'{work_dir}.txt', 'ab')  # noqa: SIM115 - the process writes to it
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def newest_iteration(folder):
    """That of the newest checkpoint in a folder, 0 without any."""
    return max((int(path.stem.split('_')[-1]) for path in folder.glob('*iter_*.pth')), default=0)


def wait_for_all(sessions):
    """Until no process of these is left; raises ``TimeoutError`` when they had time enough."""
    until = time.time() + NOTICED
    for session in sessions:
        with contextlib.suppress(ProcessLookupError):
            while os.killpg(session, 0) is None:
                if time.time() > until:
                    raise TimeoutError(f'processes of session {session} are left, {NOTICED} s after it was killed')
                time.sleep(0.1)


def survive(case, kills, seed=0):
    """Kill a run ``kills`` times; returns the names of what differs in the end."""
    chance = random.Random(seed)
    each = 8
    iterations = each * (kills + 1)
    whole = start(case, 'left_alone', iterations)
    assert whole.wait() == 0, (case.folder / 'left_alone.txt').read_text()[-3000:]
    folder, told, sessions = case.folder / 'killed', True, []
    for number in range(1, kills + 1):
        process = start(case, 'killed', iterations, *(['--resume'] if told else []))
        # Mostly in training, of which some passes each time, at times before it has begun.
        early, by = chance.random() < 0.1, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        until, began = min(newest_iteration(folder) + chance.randint(1, each), iterations - 1), time.time()
        while not early and newest_iteration(folder) < until:
            assert process.poll() is None, (case.folder / 'killed.txt').read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2 if early else 0.2))
        if by == signal.SIGTERM:
            os.killpg(process.pid, by)
        else:
            process.send_signal(by)
        status = process.wait()
        sessions.append(process.pid)
        told = status != 143
        print(f'kill {number}: {by.name} after {time.time() - began:.1f} s, exit status {status}, newest checkpoint '
              f'{newest_iteration(folder)}', flush=True)
    assert start(case, 'killed', iterations, *(['--resume'] if told else [])).wait() == 0, (
        (case.folder / 'killed.txt').read_text()[-3000:])
    wait_for_all(sessions)
    return differing(case.folder / 'left_alone' / f'iter_{iterations}.pth', folder / f'iter_{iterations}.pth')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        different = survive(Case(Path(folder), 'det', 'SpatialMamba'), args.kills, args.seed)
    print(f'{args.kills} of {args.kills} kills survived; ' + (
        f'different: {", ".join(different[:5])} and {len(different)} in all' if different else
        'weights, optimizer, schedules and averages are bit-identical'))
    return 1 if different else 0


if __name__ == '__main__':
    sys.exit(main())

"""Real processes on real files: what a user types is what is tested. Each runs on one thread, so it repeats exactly."""
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'  # photographs, where there are any
sys.path.insert(0, str(ROOT))
# before torch is imported: test processes of two threads each get in each other's way
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'
ENV = {**os.environ, 'PYTHONPATH': ''}
# for subprocess: what a command prints, standard output and error together
PIPED = dict(env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
# importing torch takes seconds: it is done once, in a server that forks a process for each script
WARM = multiprocessing.get_context('forkserver')
WARM.set_forkserver_preload(['conftest', 'prepare', 'train', 'sample', 'torch._dynamo',
                             'matplotlib.pyplot', 'datasets'])
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])  # where the server finds them
# a model that trains in a second
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--learning_rate=3e-3', '--warmup_iters=5', '--batch_size=8',
        '--log_interval=5', '--num_samples=2', '--device=cpu', '--dtype=float32']
# what the recommended config switches on
RECOMMENDED = ['--row_column_positions=True', '--neighbours=12', '--relative_neighbours=True', '--n_colour=16',
               '--relative_colours=True', '--relative_chroma=True', '--attention=local column', '--alibi=True',
               '--exclusive=True', '--muon_lr=0.02']


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def torchrun(*args):
    """train.py in two processes."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return [*launcher, str(ROOT / 'train.py'), *map(str, args)]


def heed_signals():
    """For preexec_fn of subprocess: `make test &` ignores Ctrl-C, `nohup make test` SIGHUP, and so would a child."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_script(script, args, output, cwd, env):
    """What python does with a script, in a process of its own that has imported torch already."""
    multiprocessing.set_start_method(None, force=True)  # for its own children: the usual one
    heed_signals()
    os.chdir(cwd)
    os.environ.update(env)
    with open(output, 'w') as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    runpy.run_path(script, run_name='__main__')


def wait_until(condition):
    while not condition():
        time.sleep(0.002)


class Script:
    """A script that runs in a process of its own."""

    def __init__(self, script, *args, cwd='.', env={}):
        self.output = tempfile.NamedTemporaryFile('r')
        args = (str(ROOT / script), [str(a) for a in args], self.output.name, str(cwd), env)
        self.process = WARM.Process(target=run_script, args=args)
        self.process.start()

    def is_alive(self):
        return self.process.is_alive()

    def wait_for(self, condition):
        wait_until(lambda: condition() or not self.is_alive())
        assert condition(), self.end()

    def printed(self):
        return Path(self.output.name).read_text()

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, timeout=240):
        """Wait for its end -> what it printed, standard output and error together. code is its exit code."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        self.code = self.process.exitcode
        return self.output.read()


def call(script, *args, code=0, cwd='.'):
    """Run a script to its end and check its exit code -> what it printed."""
    process = Script(script, *args, cwd=cwd)
    printed = process.end()
    assert process.code == code, printed
    return printed


def two_ranks(*args):
    """Start train.py in two processes that find each other as torchrun tells them to."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])  # a free one
    env = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
    return [Script('train.py', *args, env={**env, 'RANK': rank, 'LOCAL_RANK': rank}) for rank in '01']


def call_two_ranks(*args):
    """Run train.py in two processes to their end -> what each of them printed."""
    ranks = two_ranks(*args)
    printed = [rank.end() for rank in ranks]
    assert [rank.code for rank in ranks] == [0, 0], printed
    return printed


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """80 synthetic landscapes of 16x16."""
    folder = tmp_path_factory.mktemp('data') / 'synthetic'
    call('prepare.py', '--source', 'synthetic', '--num_images', 80, '--size', 16, '--out_dir', folder)
    return folder


@pytest.fixture(scope='session')
def trained(data, tmp_path_factory):
    """A run of 20 iterations, with checkpoints at 10 and 20."""
    folder = tmp_path_factory.mktemp('runs') / 'trained'
    args = [*TINY, '--max_iters=20', '--eval_interval=10', '--average=0.2']
    call('train.py', *args, f'--data_dir={data}', f'--out_dir={folder}')
    return folder


def pytest_collection_modifyitems(items):
    """First the page's tests, which take longest and mostly wait, then those that only a GPU can run."""
    needs_a_gpu = lambda item: any('GPU' in mark.kwargs['reason'] for mark in item.iter_markers('skipif'))
    items.sort(key=lambda item: ('test_web' not in item.nodeid, not needs_a_gpu(item)))

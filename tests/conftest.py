"""Real processes on real files: what a user types is what is tested. Each runs on one thread, so it repeats exactly."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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
WARM.set_forkserver_preload(['conftest', 'prepare', 'train', 'sample', 'torch._dynamo'])
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])  # where the server finds them
# a model that trains in a second
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--learning_rate=3e-3', '--warmup_iters=5', '--batch_size=8',
        '--log_interval=5', '--num_samples=2', '--device=cpu', '--dtype=float32']
# what the recommended config switches on
RECOMMENDED = ['--row_column_positions=True', '--neighbours=12', '--factorised_colours=True', '--relative_colours=True',
               '--attention=local column', '--alibi=True', '--muon_lr=0.02']


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def torchrun(*args):
    """train.py in two processes."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return [*launcher, str(ROOT / 'train.py'), *map(str, args)]


def run_script(script, args, output, cwd):
    """What python does with a script, in a process of its own that has imported torch already."""
    multiprocessing.set_start_method(None, force=True)  # for its own children: the usual one
    os.chdir(cwd)
    with open(output, 'w') as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    runpy.run_path(script, run_name='__main__')


def call(script, *args, code=0, cwd='.'):
    """Run a script to its end and check its exit code -> what it printed, standard output and error together."""
    script, args = str(ROOT / script), [str(a) for a in args]
    with tempfile.NamedTemporaryFile('r') as output:
        process = WARM.Process(target=run_script, args=(script, args, output.name, str(cwd)))
        process.start()
        process.join(240)
        process.kill()
        printed = output.read()
    assert process.exitcode == code, printed
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

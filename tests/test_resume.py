"""Going on: exact resuming, signals and kill -9 at any moment, full disks, and what lies in a folder already."""
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import extras
import train
from conftest import (ENV, PIPED, RECOMMENDED, ROOT, TINY, WARM, Script, call, call_two_ranks, command, heed_signals,
                      torchrun, two_ranks, wait_until)
from helpers import load, log, run, same

# -----------------------------------------------------------------------------
# resuming

def assert_same_run(a, b, last='ckpt40.pt'):
    """To the last bit; and b is finished, with nothing left over."""
    one, other = load(a / last), load(b / last)
    for part in ('model', 'training_model', 'optimizer', 'muon', 'scaler', 'best_val_loss', 'iter_num'):
        assert same(one[part], other[part]), part
    timeless = lambda out: [{key: value for key, value in row.items() if key != 'seconds'} for row in log(out)]
    assert timeless(a) == timeless(b)
    assert not (b / 'ckpt_latest.pt').exists() and not list(b.rglob('*.partial'))


def size_of(path):
    try:
        return path.stat().st_size
    except (AttributeError, FileNotFoundError):  # none, or gone again
        return 0


@pytest.mark.parametrize('model', [[], [*RECOMMENDED, '--average=0.2']], ids=['plain', 'recommended'])
def test_resuming_after_kill_9_is_exact(data, tmp_path, model):
    # with dropout, so that the random numbers count as well
    args = [*TINY, *model, f'--data_dir={data}', '--dropout=0.1', '--max_iters=20', '--eval_interval=10']
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    call('train.py', *args, f'--out_dir={whole}')
    process = Script('train.py', *args, f'--out_dir={killed}')
    process.wait_for((killed / 'ckpt10.pt').exists)
    process.send(signal.SIGKILL)
    process.end()
    assert not (killed / 'ckpt20.pt').exists()
    out = call('train.py', *args, f'--out_dir={killed}', '--init_from=resume')
    assert 'ckpt10.pt, iteration 10' in out
    assert_same_run(whole, killed, last='ckpt20.pt')
    assert (whole / 'images' / 'output20.png').read_bytes() == (killed / 'images' / 'output20.png').read_bytes()


def save_again_and_again(path, size, values):
    for value in values:
        extras.save_checkpoint({'w': torch.full((size,), float(value))}, path)


def test_kill_9_while_a_checkpoint_is_written_leaves_the_earlier_one(tmp_path):
    path = tmp_path / 'ckpt.pt'
    partial = lambda: next(tmp_path.glob('ckpt.pt.*.partial'), None)
    for trial in range(3):
        process = WARM.Process(target=save_again_and_again, args=(path, 20_000_000, range(1000)))
        process.start()
        wait_until(lambda: path.exists() and 0 < size_of(partial()) < 70_000_000 or not process.is_alive())
        assert process.is_alive()
        process.kill()
        process.join()
        assert 0 < size_of(partial()) < 80_000_000  # really in the middle
        w = load(path)['w']
        assert len(w) == 20_000_000 and (w == w[0]).all()
        partial().unlink(), path.unlink()


def test_resume_takes_the_furthest_checkpoint_whatever_its_time(data, tmp_path):
    # cp, git, unzip and a cloud's folder keep no times
    run(data, tmp_path, '--max_iters=4', '--eval_interval=2')
    os.utime(tmp_path / 'ckpt4.pt', (1, 1))
    (tmp_path / 'ckpt9.pt').write_bytes((tmp_path / 'ckpt4.pt').read_bytes()[:1000])  # cut short in copying
    for start in ('resume', tmp_path):
        out = run(data, tmp_path, '--max_iters=4', f'--init_from={start}', code=1)
        assert 'ckpt4.pt has done all 4 iterations' in out
    assert 'ckpt4.pt, iteration 4' in run(data, tmp_path / 'on', '--max_iters=5', f'--init_from={tmp_path}')


def test_two_runs_in_one_folder_are_not_mixed(data, trained, tmp_path):
    run(data, tmp_path, '--max_iters=2')
    (tmp_path / 'ckpt20.pt').write_bytes((trained / 'ckpt20.pt').read_bytes())
    out = run(data, tmp_path, '--init_from=resume', '--max_iters=30', code=1)
    assert 'holds checkpoints of 2 runs (ckpt2.pt; ckpt20.pt)' in out and '--init_from=' in out
    assert [row['iteration'] for row in log(tmp_path)] == ['2', '2']


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    # a limit on the size of files is a disk that is full at that point
    extras.save_checkpoint({'model': torch.zeros(1000)}, tmp_path / 'a.pt')
    code = '''
import resource, signal, sys, torch, extras
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
extras.run(lambda: extras.save_checkpoint({'model': torch.ones(1_000_000)}, sys.argv[1]))
'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'a.pt')], **PIPED, cwd=ROOT)
    assert done.returncode == 1 and done.stdout.startswith(f'error: no room in {tmp_path} (')
    assert len(done.stdout.splitlines()) == 1
    assert len(load(tmp_path / 'a.pt')['model']) == 1000 and os.listdir(tmp_path) == ['a.pt']


def test_two_processes_that_write_one_path_do_not_meet(tmp_path):
    write = lambda n: WARM.Process(target=save_again_and_again, args=(tmp_path / 'a.pt', 200_000, [n] * 40))
    writers = [write(1), write(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / 'a.pt').exists():
            assert load(tmp_path / 'a.pt')['w'].unique().numel() == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ['a.pt']


def test_resuming_with_another_optimizer_is_a_mistake(data, tmp_path):
    run(data, tmp_path, '--max_iters=2', '--muon_lr=0.02')
    out = run(data, tmp_path, '--max_iters=3', '--init_from=resume', code=1)
    assert 'was trained with Muon: resume with --muon_lr=more than 0' in out and 'Traceback' not in out
    without = tmp_path / 'without'
    run(data, without, '--max_iters=2')
    out = run(data, without, '--max_iters=3', '--init_from=resume', '--muon_lr=0.02', code=1)
    assert 'without Muon: resume with --muon_lr=0' in out


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(data, tmp_path):
    run(data, tmp_path, '--max_iters=5')
    before = (tmp_path / 'ckpt5.pt').read_bytes()
    args = ['--max_iters=40', '--eval_interval=5', '--learning_rate=1e30', '--min_lr=1e30', '--grad_clip=0']
    out = run(data, tmp_path, '--init_from=resume', *args, code=1)
    assert 'ckpt5.pt is the last good checkpoint' in out and 'Try a lower --learning_rate' in out
    assert 'Traceback' not in out
    assert (tmp_path / 'ckpt5.pt').read_bytes() == before
    for path in tmp_path.glob('ckpt*.pt'):
        assert all(tensor.isfinite().all() for tensor in load(path)['model'].values())


# -----------------------------------------------------------------------------
# stopping: Ctrl-C, SIGTERM, kill -9 at any moment; what lies in a folder

STEADY = [*TINY, *RECOMMENDED, '--average=0.2', '--dropout=0.1', '--batch_size=2', '--max_iters=40',
          '--eval_interval=20', '--save_every_minutes=0']


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    call('train.py', *STEADY, f'--data_dir={data}', f'--out_dir={folder}')
    return folder


def logged_up_to(folder):
    return max((int(row.split(',')[0]) for row in train.read_log(folder / 'log.csv')), default=-1)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_the_printed_command_goes_on_exactly(data, undisturbed, tmp_path, number):
    folder = tmp_path / 'my run'
    args = [*STEADY, f'--data_dir={data}', f'--out_dir={folder}']
    process = Script('train.py', *args, '--overwrite', 'True')  # two words, which the printed command leaves out
    process.wait_for(lambda: logged_up_to(folder) >= 10)
    process.send(number)
    printed = process.end(60)
    assert process.code == 128 + number and 'Traceback' not in printed
    iteration = load(folder / 'ckpt_latest.pt')['iter_num']
    assert 10 <= iteration < 40
    again = ['python', str(ROOT / 'train.py'), *args, '--init_from=resume']
    if number != signal.SIGHUP:  # which leaves nobody to read it
        assert shlex.split(printed.split(f'stopped at iteration {iteration}. Go on with')[1]) == again
    assert f'ckpt_latest.pt, iteration {iteration}' in call('train.py', *again[2:])
    assert_same_run(undisturbed, folder)


def test_before_the_first_step_too(data, undisturbed, tmp_path):
    args = [*STEADY, f'--data_dir={data}', f'--out_dir={tmp_path}']
    process = Script('train.py', *args)
    process.wait_for((tmp_path / 'log.csv').exists)  # it has just begun
    process.send(signal.SIGTERM)
    process.end(60)
    assert process.code == 128 + signal.SIGTERM or not (tmp_path / 'ckpt_latest.pt').exists()
    if (tmp_path / 'ckpt_latest.pt').exists():
        call('train.py', *args, '--init_from=resume')
        assert_same_run(undisturbed, tmp_path)


def test_kill_9_at_random_moments_between_checkpoints_by_the_clock(data, undisturbed, tmp_path):
    args = [*STEADY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--save_every_minutes=1e-4']
    rng, begin = np.random.default_rng(), []
    for _ in range(4):
        process, upto = Script('train.py', *args, *begin), logged_up_to(tmp_path) + 1
        process.wait_for(lambda: logged_up_to(tmp_path) >= upto)
        time.sleep(rng.random() * 0.1)
        process.send(signal.SIGKILL)
        process.end()
        if (tmp_path / 'ckpt_latest.pt').exists() or list(tmp_path.glob('ckpt*.pt')):
            begin = ['--init_from=resume']
    call('train.py', *args, *begin, '--overwrite=True')
    assert_same_run(undisturbed, tmp_path)


def large_validation(data, folder, times):
    """The same data, but with validation images that take seconds."""
    shutil.copytree(data, folder)
    meta = {**extras.load_meta(str(data))}
    meta['val_images'] *= times
    (folder / 'val.bin').write_bytes((data / 'val.bin').read_bytes() * times)
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def test_a_signal_during_an_evaluation_does_not_wait_for_it(data, tmp_path):
    large, out = large_validation(data, tmp_path / 'data', 1000), tmp_path / 'out'
    args = [*TINY, f'--data_dir={large}', '--max_iters=20', '--eval_at=(10,)', '--eval_batch_size=1']
    process = Script('train.py', *args, f'--out_dir={out}')
    process.wait_for(lambda: logged_up_to(out) == 10)
    time.sleep(1)
    began = time.monotonic()
    process.send(signal.SIGTERM)
    process.end(60)
    assert process.code == 128 + signal.SIGTERM and time.monotonic() - began < 4
    checkpoint = load(out / 'ckpt_latest.pt')
    assert checkpoint['iter_num'] == 10 and not (out / 'ckpt10.pt').exists()
    assert checkpoint['run']['seconds'] - float(log(out)[-1]['seconds']) < 0.5  # it was no training
    large_validation(data, tmp_path / 'small', 1)
    call('train.py', *args, f'--data_dir={tmp_path}/small', f'--out_dir={out}', '--init_from=resume')
    rows = [(row['iteration'], bool(row['val_loss'])) for row in log(out)]
    assert rows == [('5', False), ('10', False), ('10', True), ('15', False), ('20', False), ('20', True)]


def test_other_data_are_noted(data, tmp_path):
    prepared = lambda seed: call('prepare.py', '--source', data, '--size', 16, '--seed', seed,
                                 '--out_dir', tmp_path / 'd')
    prepared(1)
    call('train.py', *TINY, '--data_dir=d', f'--out_dir={tmp_path}/out', '--max_iters=1', cwd=tmp_path)
    shutil.copytree(tmp_path / 'out', tmp_path / 'first')
    out = run(tmp_path / 'd', tmp_path / 'out', '--init_from=resume', '--max_iters=2')
    assert 'going on from' in out and 'note:' not in out  # the same pictures, told otherwise
    prepared(2)  # as many, shared anew by training and validation
    out = run(tmp_path / 'd', tmp_path / 'out', '--init_from=resume', '--max_iters=3', '--seed=5')
    assert f'the pictures are others (data_dir was {tmp_path}/d, is {tmp_path}/d); seed was 1337, is 5' in out
    tokens = np.fromfile(tmp_path / 'd' / 'train.bin', '<u2')
    np.roll(tokens, 1).tofile(tmp_path / 'd' / 'train.bin')  # the same pictures for validation
    out = run(tmp_path / 'd', tmp_path / 'out', '--init_from=resume', '--max_iters=4', '--seed=5')
    assert 'the pictures are others' in out and 'seed was' not in out
    # a checkpoint that is named gives its weights to a run of their own, however short
    out = run(tmp_path / 'd', tmp_path / 'new', f'--init_from={tmp_path}/first', '--max_iters=1', '--batch_size=4')
    assert 'a new run with the weights of' in out and 'going on' not in out and 'iter 1 |' in out


def test_a_signal_during_the_painting_does_not_wait_for_it(data, tmp_path):
    args = [*TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--eval_at=(2,)', '--num_samples=5000']
    process = Script('train.py', *args)
    process.wait_for((tmp_path / 'ckpt2.pt').exists)
    process.send(signal.SIGTERM)
    printed = process.end(60)
    assert process.code == 128 + signal.SIGTERM and f'bits/pixel | the best so far | {tmp_path}/ckpt2.pt\n' in printed
    assert 'output2.png' not in printed and not (tmp_path / 'images').exists()


def test_a_second_signal_stops_at_once(data, tmp_path):
    endless = ['--batch_size=20000', '--gradient_accumulation_steps=10000']
    process = Script('train.py', *TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', *endless)
    process.wait_for((tmp_path / 'log.csv').exists)
    time.sleep(0.5)
    process.send(signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # it finishes its step
    process.send(signal.SIGINT)
    printed = process.end(10)
    assert process.code == 130 and printed.endswith('stopped\n') and 'Traceback' not in printed
    assert not list(tmp_path.glob('ckpt*'))


@pytest.mark.parametrize('how', ['SIGTERM to torchrun', 'Ctrl-C in its terminal'])
def test_two_ranks_stop_together(data, tmp_path, how):
    typed = torchrun(*TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--max_iters=100000')
    process = subprocess.Popen(typed, **PIPED, start_new_session=True, preexec_fn=heed_signals)
    wait_until(lambda: logged_up_to(tmp_path) >= 10 or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    process.terminate() if how.startswith('SIGTERM') else os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert 'stopped at iteration' in printed and 'torchrun ...' in printed
    iteration = load(tmp_path / 'ckpt_latest.pt')['iter_num']
    # resumed, without a step left to do
    args = [*TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--init_from=resume', f'--max_iters={iteration}']
    assert f'going on from {tmp_path}/ckpt_latest.pt, iteration {iteration}' in call_two_ranks(*args)[0]


def test_two_ranks_go_on_with_the_mean_loss_of_both(data, tmp_path):
    args = [*TINY, f'--data_dir={data}', '--min_lr=3e-3', '--log_interval=1000000']  # a rate without a schedule
    ranks = two_ranks(*args, f'--out_dir={tmp_path}/two', '--max_iters=100000')
    ranks[0].wait_for(lambda: 'iter 1 |' in ranks[0].printed())
    ranks[1].send(signal.SIGTERM)
    printed = [rank.end(60) for rank in ranks]
    assert [rank.code for rank in ranks] == [128 + signal.SIGTERM] * 2, printed
    last = load(tmp_path / 'two' / 'ckpt_latest.pt')['iter_num'] + 1
    call_two_ranks(*args, f'--out_dir={tmp_path}/two', '--init_from=resume', f'--max_iters={last}')
    call('train.py', *args, f'--out_dir={tmp_path}/one', f'--max_iters={last}')
    losses = [float(log(tmp_path / out)[0]['train_loss']) for out in ('one', 'two')]
    assert losses[0] == pytest.approx(losses[1], abs=5e-5)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_run_in_the_folder_is_not_touched_unless_told(data, trained, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(trained, folder)
    before = contents(folder)
    for args in (
        [],
        [f'--init_from={trained}/ckpt20.pt', '--max_iters=25'],
        [f'--init_from={folder}/ckpt10.pt', '--max_iters=15', '--average=0.2'],
        ['--overwrite=True', '--wandb_log=True'],
        ['--overwrite=True', '--n_head=3'],
        ['--overwrite=True', f'--init_from={folder}/none.pt'],
    ):
        out = run(data, folder, *args, code=1)
        assert out.splitlines()[-1].startswith('error: ') and contents(folder) == before, args
        if '--overwrite=True' not in args:
            for choice in ('--init_from=resume', 'another --out_dir', '--overwrite=True'):
                assert choice in out
    run(data, folder, '--overwrite=True', '--max_iters=3', '--learning_rate=1e-3')
    assert sorted(path.name for path in folder.glob('*.pt')) == ['ckpt3.pt']
    assert {row['iteration'] for row in log(folder)} == {'3'}
    # back to an earlier checkpoint: later ones and their rows go
    shutil.rmtree(folder), shutil.copytree(trained, folder)
    run(data, folder, '--overwrite=True', f'--init_from={folder}/ckpt10.pt', '--max_iters=12', '--average=0.2')
    assert sorted(path.name for path in folder.glob('*.pt')) == ['ckpt10.pt', 'ckpt12.pt']
    assert [row['iteration'] for row in log(folder)] == ['5', '10', '10', '12', '12']
    # weights alone are no run
    checkpoint = load(trained / 'ckpt20.pt')
    weights = {name: checkpoint[name] for name in ('model', 'model_args', 'iter_num')}
    extras.save_checkpoint(weights, tmp_path / 'weights' / 'ckpt6000.pt')
    run(data, tmp_path / 'weights', '--max_iters=2')


def test_compilers_fail_before_anything_is_written(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    before = contents(tmp_path / 'out')
    no_compiler = {'PATH': str(tmp_path), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    process = Script('train.py', *TINY, f'--data_dir={data}', f'--out_dir={tmp_path}/out', '--overwrite=True',
                     '--compile=True', env=no_compiler)
    printed = process.end()
    assert process.code == 1 and 'Traceback' not in printed
    assert printed.splitlines()[-1].startswith('error: torch.compile does not work here')
    assert contents(tmp_path / 'out') == before


def test_one_process_at_a_time_in_a_folder(data, tmp_path):
    lock = extras.lock(str(tmp_path))
    assert f'another process is writing to {tmp_path}' in run(data, tmp_path, '--max_iters=1', code=1)
    lock.release()
    left = ['ckpt5.pt', 'log.csv', 'loss.png', 'images/output5.png']  # by a run that was killed
    live = ['other_run/ckpt5.pt', 'images/sample.png']  # other programs are writing these
    for name in left + live:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f'{name}.0a1b2c3d.partial').touch()
    run(data, tmp_path, '--max_iters=1')
    assert set(tmp_path.rglob('*.partial')) == {tmp_path / f'{name}.0a1b2c3d.partial' for name in live}


def test_a_full_disk_while_training_is_one_line(data, tmp_path):
    def fill_the_disk(size, *args):
        args = [*TINY, f'--data_dir={data}', f'--out_dir={tmp_path}', '--eval_interval=5', '--max_iters=20', *args]
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        done = subprocess.run(command('train.py', *args), **PIPED, preexec_fn=limit)
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(f'error: no room in {tmp_path} (')
        return done.stdout

    assert 'Traceback' not in fill_the_disk(100_000)  # less than a checkpoint
    assert not list(tmp_path.glob('*.pt*'))
    fill_the_disk(100, '--overwrite=True')  # less than a log


def test_weights_of_another_image_size_start_a_new_run(data, tmp_path):
    call('prepare.py', '--source', 'synthetic', '--num_images', 20, '--size', '32x24', '--out_dir', tmp_path / 'larger')
    run(data, tmp_path / 'a', *RECOMMENDED, '--max_iters=25')
    small_step, bits = ['--max_iters=1', '--learning_rate=1e-6', '--min_lr=0', '--muon_lr=1e-6'], {}
    for name, args in (('new', []), ('larger', [f'--init_from={tmp_path}/a/ckpt25.pt'])):
        out = run(tmp_path / 'larger', tmp_path / name, *RECOMMENDED, *small_step, *args)
        bits[name] = float(log(tmp_path / name)[-1]['bits_per_pixel'])
    assert 'a new run with the weights of' in out and bits['larger'] < bits['new'] - 2
    run(data, tmp_path / 'plain', '--max_iters=1')
    out = run(tmp_path / 'larger', tmp_path / 'plain', '--init_from=resume', code=1)
    assert f'ckpt1.pt paints 16x16 pixels, {tmp_path}/larger holds 32x24: resume with the data' in out
    out = run(tmp_path / 'larger', tmp_path / 'x', f'--init_from={tmp_path}/plain/ckpt1.pt', code=1)
    assert 'has block_size=256, this run block_size=768' in out
    out = run(data, tmp_path / 'y', f'--init_from={ROOT}/out/ckpt6000.pt', code=1)
    assert 'has n_layer=8, this run n_layer=2' in out  # which a config can change, sooner than the size of the pictures

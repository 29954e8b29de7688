"""The training loop: order, several processes, precision, what a run leaves."""
import math
import os
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import extras
import train
from conftest import RECOMMENDED, ROOT, TINY, call, call_two_ranks
from helpers import load, log, run, same
from model import GPTConfig

# -----------------------------------------------------------------------------
# data and schedule

def test_every_image_once_an_epoch_in_an_order_of_seed_and_epoch_alone():
    orders = {(seed, epoch): train.epoch_order(seed, epoch, 50)[0].tolist() for seed in (1, 2) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    train.epoch_order.cache_clear()
    assert train.epoch_order(2, 1, 50)[0].tolist() == orders[2, 1]


def test_batches_walk_through_the_epochs_without_a_gap():
    data = np.arange(10, dtype=np.uint16)[:, None].repeat(6, 1)
    config, meta = train.TrainConfig(flip=False, seed=3), dict(height=2, width=3)
    batches = [train.get_batch(data, range(i, i + 4), config, meta, 'cpu') for i in range(0, 40, 4)]
    seen = torch.cat([batch[:, 0] for batch in batches]).tolist()
    assert seen == [i for epoch in range(4) for i in train.epoch_order(3, epoch, 10)[0]]


def test_flips_mirror_rows_and_nothing_else():
    data = np.arange(600, dtype=np.uint16).reshape(100, 6)
    meta = dict(height=2, width=3)
    flipped = train.get_batch(data, range(100), train.TrainConfig(flip=True), meta, 'cpu').reshape(100, 2, 3)
    plain = train.get_batch(data, range(100), train.TrainConfig(flip=False), meta, 'cpu').reshape(100, 2, 3)
    mirrored = (flipped == plain.flip(2)).all((1, 2))
    assert 30 < mirrored.sum() < 70 and (mirrored | (flipped == plain).all((1, 2))).all()


def test_learning_rate():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.get_lr(i, config) for i in range(111)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize('share', [0.05, 0.2])
def test_averaged_weights_are_as_old_as_the_share_says_however_long_the_run(share):
    model, averaged = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for iteration in range(1, 2001):
        torch.nn.init.constant_(model.weight, iteration)
        train.update_average(averaged, model, iteration, share)
        if iteration in (1, 200, 2000):
            assert iteration - averaged.weight.item() == pytest.approx(share * iteration, abs=0.6)


# -----------------------------------------------------------------------------
# what a run leaves

def test_what_a_run_leaves(trained, data):
    names = sorted(p.name for p in trained.iterdir())
    assert names == ['.lock', 'ckpt10.pt', 'ckpt20.pt', 'images', 'log.csv', 'loss.png']
    for name in ('loss.png', 'images/output10.png', 'images/output20.png'):
        with Image.open(trained / name) as image:
            assert min(image.size) >= 32
    rows = log(trained)
    assert [int(r['iteration']) for r in rows] == [5, 10, 10, 15, 20, 20]
    assert [bool(r['val_loss']) for r in rows] == [False, False, True] * 2
    for r in rows:
        assert int(r['images']) == 8 * int(r['iteration']) and int(r['tokens']) == 256 * int(r['images'])
        loss = float(r['val_loss'] or r['train_loss'])
        assert float(r['bits_per_pixel']) == pytest.approx(loss / math.log(2), abs=1e-4)
    assert [float(r['seconds']) for r in rows] == sorted(float(r['seconds']) for r in rows)
    checkpoint = load(trained / 'ckpt20.pt')
    assert checkpoint.keys() == {'model', 'training_model', 'optimizer', 'scaler', 'model_args', 'iter_num',
                                 'best_val_loss', 'config', 'height', 'width', 'run', 'muon'}
    assert checkpoint['iter_num'] == 20 and checkpoint['height'] == checkpoint['width'] == 16
    averaged, weights = checkpoint['model'], checkpoint['training_model']
    assert not any('_orig_mod' in name or name.startswith('module.') for name in averaged)
    assert averaged.keys() == weights.keys() and not same(averaged, weights)


def test_validation_counts_every_pixel_of_every_image(trained, data):
    model = extras.build_model(extras.load_checkpoint(str(trained / 'ckpt20.pt')), '', 'cpu')
    val = extras.load_tokens(str(data), 'val', extras.load_meta(str(data)))
    with torch.no_grad():
        losses = [model(torch.from_numpy(row[None].astype(np.int64))).item() for row in val]
    assert len(losses) == 8 and float(log(trained)[-1]['val_loss']) == pytest.approx(np.mean(losses), abs=1e-4)


def test_it_learns(data, tmp_path):
    run(data, tmp_path, '--max_iters=50', '--batch_size=4')
    plain = float(log(tmp_path)[-1]['bits_per_pixel'])
    assert plain < 9.5 < 11 < float(log(tmp_path)[0]['bits_per_pixel'])
    run(data, tmp_path / 'recommended', *RECOMMENDED, '--max_iters=50', '--batch_size=4')
    assert float(log(tmp_path / 'recommended')[-1]['bits_per_pixel']) < plain - 1


def test_a_config_file_and_the_command_line_over_it(data, tmp_path):
    lines = ['"""Mine."""', 'batch_size = 2 * 4  # images', 'max_iters = batch_size // 2', 'eval_at = (1, 3)',
             'flip = False', 'learning_rate = 1']
    (tmp_path / 'my.py').write_text('\n'.join(lines) + '\n')
    tiny = [a for a in TINY if 'batch_size' not in a]
    call('train.py', tmp_path / 'my.py', *tiny, f'--data_dir={data}', f'--out_dir={tmp_path}', '--max_iters=3')
    config = load(tmp_path / 'ckpt3.pt')['config']
    assert (config['batch_size'], config['max_iters'], config['eval_at'], config['flip']) == (8, 3, (1, 3), False)
    assert config['learning_rate'] == 3e-3  # the command line wins
    assert (tmp_path / 'ckpt1.pt').exists()


@pytest.mark.parametrize('text, key, value', [
    ('\ufeffbatch_size = 8', 'batch_size', 8),
    ('n_embd = 2**5', 'n_embd', 32),
    ('learning_rate = 10 ** -3', 'learning_rate', 1e-3),
    ('max_iters = +10', 'max_iters', 10),
    ('max_iters = int(1e4)', 'max_iters', 10000),
    ('batch_size: int = 8', 'batch_size', 8),
    ('n_layer = n_head = 2', 'n_head', 2),
    ('batch_size = 17 % 9', 'batch_size', 8),
    ('batch_size = 8; max_iters = 10', 'max_iters', 10),
    ('learning_rate = 1/8', 'learning_rate', 0.125),
    ("wandb_run_name = 'gr\u00fcn'", 'wandb_run_name', 'gr\u00fcn'),
])
def test_what_a_config_file_may_say(tmp_path, text, key, value):
    (tmp_path / 'my.py').write_text(text + '\n', encoding='utf-8')
    assert getattr(extras.load_config(train.TrainConfig, [str(tmp_path / 'my.py')]), key) == value


def test_every_config_file_of_the_repository_is_understood():
    for path in sorted((ROOT / 'config').glob('*.py')):
        config = extras.load_config(train.TrainConfig, [str(path)])
        of_the_model = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
        GPTConfig(width=64, block_size=4096 - (not config.start_embedding), **of_the_model)


def test_folders_of_a_config_file_are_meant_from_the_repository_and_typed_ones_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = extras.load_config(train.TrainConfig, ['config/demo.py', '--out_dir=mine'])
    assert (config.data_dir, config.out_dir) == (str(ROOT / 'data' / 'demo'), 'mine')
    (tmp_path / 'home.py').write_text("data_dir = '~/pictures'\n")
    config = extras.load_config(train.TrainConfig, ['--out_dir=~/runs', 'home.py'])  # which no shell expands
    assert (config.out_dir, config.data_dir) == (os.path.expanduser('~/runs'), os.path.expanduser('~/pictures'))


def test_help_lists_every_key():
    out = call('train.py', '--help')
    for name in train.TrainConfig.__dataclass_fields__:
        assert f'--{name} ' in out


def test_old_checkpoints_go_but_not_the_best(data, tmp_path):
    run(data, tmp_path, '--max_iters=6', '--eval_interval=2', '--keep_checkpoints=2')
    assert sorted(tmp_path.glob('ckpt*.pt')) == [tmp_path / 'ckpt4.pt', tmp_path / 'ckpt6.pt']
    # from here on a learning rate far too high: nothing after iteration 6 is better
    (tmp_path / 'ckpt999.pt').write_bytes(b'of another run')
    args = ['--eval_interval=2', '--learning_rate=5', '--min_lr=5', '--grad_clip=0']
    run(data, tmp_path, *args, f'--init_from={tmp_path}/ckpt6.pt', '--max_iters=10', '--keep_checkpoints=2')
    assert {p.name for p in tmp_path.glob('ckpt*.pt')} == {'ckpt6.pt', 'ckpt10.pt', 'ckpt999.pt'}
    # with --keep_checkpoints=1 the last one stays, which can be resumed, and the best one beside it
    run(data, tmp_path, *args, '--init_from=resume', '--max_iters=12', '--keep_checkpoints=1')
    assert {p.name for p in tmp_path.glob('ckpt*.pt')} == {'ckpt6.pt', 'ckpt12.pt', 'ckpt999.pt'}
    # when somebody has removed the best one, the last line names a file that is there
    (tmp_path / 'ckpt6.pt').unlink()
    out = run(data, tmp_path, *args, '--init_from=resume', '--max_iters=14', '--keep_checkpoints=1')
    assert os.path.exists(out.split('--ckpt ')[1].strip())


def test_going_on_in_another_folder_leaves_alone_what_lies_there(data, trained, tmp_path):
    (tmp_path / 'ckpt10.pt').write_bytes(b'of another run')
    (tmp_path / 'log.csv').write_bytes((trained / 'log.csv').read_bytes())
    args = [f'--init_from={trained}/ckpt20.pt', '--max_iters=24', '--eval_interval=2', '--keep_checkpoints=1',
            '--learning_rate=1', '--min_lr=1']
    assert f'{tmp_path} holds a run (log.csv)' in run(data, tmp_path, *args, code=1)
    out = run(data, tmp_path, *args, '--overwrite=True')
    assert (tmp_path / 'ckpt10.pt').read_bytes() == b'of another run'
    assert (trained / 'ckpt10.pt').exists()
    best = out.split('--ckpt ')[1].strip()
    assert best.startswith(str(tmp_path)) and load(best)['iter_num'] > 20  # what it says to paint with is there
    assert all(int(row['iteration']) > 20 for row in log(tmp_path))  # the log is this run's


def test_a_new_run_starts_with_weights_alone(data, trained, tmp_path):
    checkpoint = load(trained / 'ckpt20.pt')
    weights = {name: checkpoint[name] for name in ('model', 'model_args', 'height', 'width')}
    extras.save_checkpoint(weights, tmp_path / 'weights.pt')
    args = ['--max_iters=2', '--learning_rate=1e-6', '--min_lr=0']
    out = run(data, tmp_path, f'--init_from={tmp_path}/weights.pt', *args)
    assert 'a new run with the weights of' in out and 'iter 1 |' in out
    assert float(log(tmp_path)[-1]['val_loss']) == pytest.approx(float(log(trained)[-1]['val_loss']), abs=1e-3)


# -----------------------------------------------------------------------------
# several processes and pieces

def close(a, b, atol=2e-5):
    return all(torch.allclose(a[name], b[name], atol=atol, rtol=1e-4) for name in a)


def test_gradient_accumulation_changes_nothing_but_memory(data, tmp_path):
    run(data, tmp_path / 'whole', '--max_iters=6')
    run(data, tmp_path / 'pieces', '--max_iters=6', '--gradient_accumulation_steps=4')
    assert close(load(tmp_path / 'whole' / 'ckpt6.pt')['model'], load(tmp_path / 'pieces' / 'ckpt6.pt')['model'])


@pytest.mark.parametrize('model', [[], RECOMMENDED], ids=['plain', 'recommended'])
def test_two_ranks_are_one_process_with_the_same_batch(data, tmp_path, model):
    args = [*TINY, *model, f'--data_dir={data}', '--max_iters=6', '--log_interval=2']
    call('train.py', *args, f'--out_dir={tmp_path}/one')
    printed = call_two_ranks(*args, f'--out_dir={tmp_path}/two', '--gradient_accumulation_steps=2')
    assert [rank.count('iter 6 | validation') for rank in printed] == [1, 0]  # one rank speaks
    one, two = load(tmp_path / 'one' / 'ckpt6.pt'), load(tmp_path / 'two' / 'ckpt6.pt')
    assert one['model'].keys() == two['model'].keys()
    # colour differences that hardly occur have gradients of mere rounding, of which AdamW still makes whole steps
    assert close(one['model'], two['model'], atol=2e-4 if model else 2e-5)
    for a, b in zip(log(tmp_path / 'one'), log(tmp_path / 'two'), strict=True):
        assert float(a['bits_per_pixel']) == pytest.approx(float(b['bits_per_pixel']), abs=1e-3)
    # and a run of one rank can be resumed by two
    printed = call_two_ranks(*args, f'--out_dir={tmp_path}/one', '--init_from=resume', '--max_iters=8')
    assert 'ckpt8.pt' in printed[0]


def test_products_in_float32_stay_exact():
    # TF32 is for networks; Muon's iteration goes astray in it, and nothing but a GPU shows that
    machine = train.set_up_machine(train.TrainConfig(device='cpu'))
    assert machine.device == 'cpu' and torch.get_float32_matmul_precision() == 'highest'


def test_without_start_embedding_it_trains_and_paints(data, tmp_path):
    run(data, tmp_path, '--max_iters=3', '--start_embedding=False')
    checkpoint = load(tmp_path / 'ckpt3.pt')
    assert checkpoint['model_args']['block_size'] == 255 and 'transformer.wse.weight' not in checkpoint['model']
    assert (tmp_path / 'images' / 'output3.png').exists()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_precisions_a_cpu_knows(data, tmp_path, dtype):
    assert f' cpu, {dtype}\n' in run(data, tmp_path, *RECOMMENDED, '--max_iters=3', f'--dtype={dtype}')
    assert all(t.dtype == torch.float32 for t in load(tmp_path / 'ckpt3.pt')['model'].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('args', [
    ['--dtype=bfloat16'],
    [*RECOMMENDED, '--dtype=bfloat16'],
    [*RECOMMENDED, '--dtype=float16', '--compile=False'],
    [*RECOMMENDED, '--dtype=float32', '--compile=False'],
], ids=['plain', 'recommended', 'float16', 'float32'])
def test_on_a_gpu(data, tmp_path, args):
    tiny = [a for a in TINY if 'device' not in a and 'dtype' not in a]
    args = [*tiny, f'--data_dir={data}', '--device=cuda', '--max_iters=60', '--eval_interval=30', '--average=0.1',
            *args]
    call('train.py', *args, f'--out_dir={tmp_path}/whole')
    bits = [float(row['bits_per_pixel']) for row in log(tmp_path / 'whole') if row['val_loss']]
    assert bits[1] < 9.5 and bits[1] < bits[0]
    weights = load(tmp_path / 'whole' / 'ckpt60.pt')['model']
    assert not any('_orig_mod' in name for name in weights)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())
    # resumed it goes the same way, though not to the last bit: sums come in any order on a GPU
    (tmp_path / 'killed').mkdir()
    (tmp_path / 'whole' / 'ckpt30.pt').rename(tmp_path / 'killed' / 'ckpt30.pt')
    call('train.py', *args, f'--out_dir={tmp_path}/killed', '--init_from=resume')
    assert float(log(tmp_path / 'killed')[-1]['bits_per_pixel']) == pytest.approx(bits[1], abs=0.05)

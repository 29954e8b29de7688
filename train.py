"""Train a GPT to paint.

    python train.py config/landscape.py                             # the keys below, overridden by the file ...
    python train.py config/landscape.py --batch_size=2              # ... and then by the command line
    python train.py config/landscape.py --init_from=resume          # go on where the last checkpoint stopped
    torchrun --standalone --nproc_per_node=8 train.py config/landscape.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py config/landscape.py
"""
import contextlib
import copy
import csv
import datetime
import functools
import glob
import math
import os
import shlex
import signal
import sys
import time
import uuid
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import extras
from extras import UserError, key
from model import GPT, GPTConfig


@dataclass
class TrainConfig:
    """Every key of a config file: its type, its default, and what it means (this is what --help prints)."""
    # files
    data_dir: str = key('data/landscape', 'the data set: a folder that prepare.py has filled')
    out_dir: str = key('out', 'checkpoints, log.csv, loss.png and images/ go here')
    init_from: str = key('scratch', "'scratch', 'resume' (from the furthest checkpoint in out_dir), or a checkpoint to go on from, or a folder of them; of weights alone, as in out/ckpt6000.pt, a new run starts")
    overwrite: bool = key(False, 'start although a run lies in out_dir: its log and its checkpoints are removed')
    save_every_minutes: float = key(15.0, 'also write ckpt_latest.pt so often, for --init_from=resume, as when the run is stopped (0: only when it is stopped)')
    keep_checkpoints: int = key(10, 'how many checkpoints of a run stay on disk; the best one always does')
    # the model
    n_layer: int = key(4, 'transformer blocks')
    n_head: int = key(4, 'attention heads of a block')
    n_embd: int = key(128, 'width of the residual stream')
    dropout: float = key(0.0, 'probability of dropout in training')
    start_embedding: bool = key(True, 'learn an embedding that stands before the first pixel, so that the first pixel is predicted too')
    row_column_positions: bool = key(False, 'an embedding of the row plus one of the column of the predicted pixel, not one of each position')
    neighbours: int = key(0, 'how many of the nearest known pixels (24 at most) a small MLP feeds into the first block')
    n_colour: int = key(0, "numbers in a colour's vector, which two small layers take to and from n_embd: fewer leave parameters for more layers (0: n_embd)")
    factorised_colours: bool = key(False, "a colour's vector, in embedding and head, is its own plus one for each of its red, green and blue levels")
    relative_colours: bool = key(False, 'let the head also score how much each channel differs from the pixels to the left and above')
    attention: str = key('full', "what the layers attend to, in turn: all pixels so far (full), those of the same row and the one above (local) or of the same column (column), as in 'local column'")
    reach: int = key(0, 'local attention sees the row above up to so many columns to the right, and rows begin with the start embedding (0: all of the row)')
    alibi: bool = key(False, 'let local and column attention fade with distance, at another rate for each head')
    # the optimiser
    batch_size: int = key(40, 'images an iteration, over all processes and accumulation steps')
    gradient_accumulation_steps: int = key(1, 'pieces (micro-batches) in which a process works through its share of the batch, to save memory')
    max_iters: int = key(10000, 'iterations')
    learning_rate: float = key(6e-4, 'peak of the schedule: linear warm-up, cosine decay')
    min_lr: float = key(6e-5, 'end of the schedule, at max_iters')
    muon_lr: float = key(0.0, 'peak for the matrices between embeddings and head (blocks, stem), which Muon then updates, on the same schedule (0: AdamW for all)')
    warmup_iters: int = key(200, 'iterations of the warm-up')
    weight_decay: float = key(0.1, 'of embeddings and matrices, by AdamW and Muon')
    beta1: float = key(0.9, 'AdamW: memory of the gradient')
    beta2: float = key(0.95, 'AdamW: memory of its square')
    grad_clip: float = key(1.0, 'clip the norm of the gradient to this (0: never)')
    average: float = key(0.0, 'evaluate, paint and save averaged weights; as a share of the iterations so far, how old they are on average (0: the newest weights)')
    flip: bool = key(True, 'mirror half of the images, picked anew each epoch')
    # looking at it
    eval_interval: int = key(0, 'evaluate every so many iterations (0: at eval_at only); the last one is always evaluated')
    eval_at: tuple = key((), 'evaluate at these iterations too, as in (200, 400, 800)')
    eval_batch_size: int = key(4, 'validation images at a time; a matter of memory alone')
    num_samples: int = key(16, 'images on the sheet of samples that every evaluation paints')
    log_interval: int = key(10, 'iterations between two log lines')
    wandb_log: bool = key(False, 'log to Weights & Biases as well (pip install wandb)')
    wandb_project: str = key('pixelgpt', 'its project')
    wandb_run_name: str = key('landscape', 'its name of the run')
    # the machine
    seed: int = key(1337, 'decides the initial weights, the order of the images and the noise of the samples')
    device: str = key('auto', "'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    dtype: str = key('auto', "'auto' (bfloat16 where the GPU, or the CPU with AMX, has it; else float16 with a loss scaler on CUDA, else float32) or one of the three")
    compile: bool | str = key('auto', "torch.compile: True, False, or 'auto' (on CUDA)")

# -----------------------------------------------------------------------------
# data

@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, images):
    """-> (order, mirrored): all images in a new order and which of them to flip, a pure function of (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(images), rng.random(images) < 0.5


def get_batch(data, slots, config, meta, device):
    """slots: numbers in the endless sequence of epochs -> (len(slots), tokens_per_image) int64 tensor."""
    rows = []
    for slot in slots:
        epoch, i = divmod(slot, len(data))
        order, mirrored = epoch_order(config.seed, epoch, len(data))
        row = data[order[i]].reshape(meta['height'], meta['width'])
        rows.append(row[:, ::-1] if config.flip and mirrored[i] else row)
    return to_device(np.stack(rows).reshape(len(rows), -1), device)


def to_device(tokens, device):
    """Rows of tokens (B, T), an array -> int64 tensor on device. Raises UserError."""
    if tokens.max() >= extras.VOCAB_SIZE:
        raise UserError(f'the data hold the token {tokens.max()}, which is no 12-bit colour: prepare them again')
    tokens = torch.from_numpy(tokens.astype(np.int64))
    return tokens.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else tokens.to(device)


def get_lr(iteration, config):
    """Learning rate of an iteration: linear warm-up from near 0, then half a cosine down to min_lr."""
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    ratio = (iteration - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


@torch.no_grad()
def update_average(averaged_model, model, iteration, share):
    """Take the weights of model after an iteration (from 1 on) into the average, whose mean age is that share of the iterations.

    The power-law average of Karras et al. 2023 (arXiv 2312.02696): the window grows with the run, so that an early checkpoint gets a short one.
    """
    beta = (1 - 1 / iteration) ** (1 / share - 1)
    torch._foreach_lerp_(list(averaged_model.parameters()), list(model.parameters()), 1 - beta)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate(model, data, config, device, autocast, rank, world_size, caught=()):
    """Mean loss in nats over every predicted pixel of every image in data; each rank takes its share of them. None if a signal was caught meanwhile."""
    model.eval()
    mine, size, total, seen = data[rank::world_size], config.eval_batch_size, 0.0, 0
    for i in tqdm(range(0, len(mine), size), desc='validation', leave=False, disable=rank > 0 or None):
        if caught:
            break
        tokens = to_device(mine[i:i + size], device)
        with autocast:
            total += model(tokens).item() * len(tokens)
        seen += len(tokens)
    if world_size > 1:
        sums = torch.tensor([total, seen], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        total, seen = sums.tolist()
    model.train()
    return total / seen if seen == len(data) else None


def paint_samples(model, data, config, meta, path, caught=()):
    """A sheet of num_samples images; the noise is the same at every evaluation, so that one sees the model change. None if a signal was caught."""
    prompts = np.zeros((config.num_samples, 0))
    if not config.start_embedding:  # the first pixels of real images
        prompts = np.resize(data[:config.num_samples, :1], (config.num_samples, 1))

    def progress(pixels):
        bar.update(pixels)
        if caught:
            raise KeyboardInterrupt

    with tqdm(total=len(prompts) * (meta['tokens_per_image'] - prompts.shape[1]), desc='painting', unit='px', unit_scale=True, leave=False, disable=None) as bar, \
            contextlib.suppress(KeyboardInterrupt):
        tokens = model.generate(prompts, generator=torch.Generator().manual_seed(config.seed), progress=progress)
        images = tokens.reshape(-1, meta['height'], meta['width'])
        extras.save_picture(extras.sheet([extras.to_image(image, scale=2) for image in images]), path)

# -----------------------------------------------------------------------------
# the log

COLUMNS = ['iteration', 'images', 'tokens', 'seconds', 'learning_rate', 'train_loss', 'val_loss', 'bits_per_pixel']


def logged(path):
    """-> the rows of a log.csv, if there is one, without its head and one that was cut short."""
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        return [row for row in f if row.split(',')[0].isdigit() and row.endswith('\n')]
    return []


def start_log(path, iteration):
    """Begin log.csv, or when resuming at iteration drop the rows that come after it."""
    rows = [row for row in logged(path) if int(row.split(',')[0]) <= iteration]
    with extras.atomic_write(path) as f:
        f.write((','.join(COLUMNS) + '\n' + ''.join(rows)).encode())


def start_wandb(config):
    """-> the module wandb, its run begun. Raises UserError."""
    try:
        import wandb
        wandb.init  # a folder called wandb is no module
    except (ImportError, AttributeError):
        raise UserError('--wandb_log=True needs wandb: pip install wandb') from None
    try:
        wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))
    except Exception as e:  # no key, no network
        raise UserError(f'wandb cannot start ({extras.brief(e)}): run  wandb login , or leave --wandb_log out') from None
    return wandb


def plot_log(path, png):
    """log.csv -> loss.png: bits per pixel over images seen."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(figsize=(8, 5))
    for column, style, label in (('train_loss', '-', 'training batches'), ('val_loss', 'o-', 'validation, all images')):
        points = [(int(row['images']), float(row['bits_per_pixel'])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1, alpha=0.6 if column == 'train_loss' else 1)
    axes.set(xlabel='images seen', ylabel='bits per pixel (12.0 is a uniform guess)')
    axes.grid(alpha=0.3)
    axes.legend()
    with extras.atomic_write(png) as f:
        figure.savefig(f, format='png', dpi=100, bbox_inches='tight')
    plt.close(figure)

# -----------------------------------------------------------------------------

def check(config, world_size):
    """Values that have the right type and still make no sense. Raises UserError."""
    positive = ('n_layer', 'n_head', 'n_embd', 'batch_size', 'gradient_accumulation_steps', 'max_iters', 'learning_rate',
                'log_interval', 'eval_batch_size', 'num_samples', 'keep_checkpoints')
    not_negative = ('n_colour', 'muon_lr', 'min_lr', 'warmup_iters', 'weight_decay', 'grad_clip', 'eval_interval', 'save_every_minutes')
    below_one = ('dropout', 'beta1', 'beta2', 'average')
    pieces = world_size * config.gradient_accumulation_steps
    extras.check_values(
        config, **{name: ('more than 0', getattr(config, name) > 0) for name in positive},
        **{name: ('0 or more', getattr(config, name) >= 0) for name in not_negative},
        **{name: ('0 or more and less than 1', 0 <= getattr(config, name) < 1) for name in below_one},
        seed=('from 0 to 2 ** 63 - 1', 0 <= config.seed < 2 ** 63))
    extras.check_values(config, batch_size=(
        f'a multiple of {pieces}: {world_size} processes x --gradient_accumulation_steps={config.gradient_accumulation_steps}', config.batch_size % pieces == 0))


def find_checkpoint(config):
    """--init_from -> the path of the checkpoint to go on from: in a folder the one with most iterations. Raises UserError."""
    folder = config.out_dir if config.init_from == 'resume' else config.init_from
    if config.init_from != 'resume' and not os.path.isdir(folder):
        return config.init_from
    heads = extras.checkpoint_heads(folder)
    runs = {}
    for path, head in heads.items():
        if head['run']:  # not weights alone
            runs.setdefault(head['run'].get('id'), []).append(path)
    if not runs:
        weights = next(iter(heads), None)
        raise UserError(f'nothing to resume: {weights} holds weights alone; --init_from={shlex.quote(weights)} starts a new run with them' if weights else
                        f'nothing to resume: no checkpoint in {folder}; leave --init_from out to start')
    if len(runs) > 1:
        raise UserError(f"{folder} holds checkpoints of {len(runs)} runs ({'; '.join(', '.join(map(os.path.basename, paths)) for paths in runs.values())}): "
                        'name the one to go on from, as in --init_from=' + shlex.quote(next(iter(runs.values()))[0]))
    return max(*runs.values(), key=lambda path: heads[path]['iter_num'])


def restore(path, config, meta, model_args, raw_model, averaged_model, optimizers, scaler, device):
    """Load a checkpoint into models, optimisers and scaler -> (iteration, the rest of what it tells of its run, or {} if it holds weights alone). Raises UserError."""
    checkpoint = extras.load_checkpoint(path, device)
    resized = (checkpoint['height'], checkpoint['width']) != (meta['height'], meta['width'])
    resume = 'run' in checkpoint and not resized
    theirs = {**(checkpoint['config'] if resume else {}), **checkpoint['model_args']}
    for name, value in {**model_args, 'batch_size': config.batch_size}.items():
        value_there = theirs.get(name, getattr(GPTConfig, name, value))
        fits = value_there == value or name == 'dropout' or resized and config.row_column_positions and name in ('block_size', 'width')
        if not fits:
            raise UserError(f"{path} has {name}={value_there}, this run {name}={value}: resume with the config (and data) it was made with")
    weights = checkpoint['model']
    with extras.fitting(path):
        if resized:  # images of another size: rows and columns are stretched
            for name in ('transformer.wre.weight', 'transformer.wce.weight'):
                weights[name] = F.interpolate(weights[name].T[None], len(raw_model.get_parameter(name)), mode='linear', align_corners=True)[0].T
        averaged_model.load_state_dict(weights)
        raw_model.load_state_dict(resume and checkpoint.get('training_model') or weights)
    if not resume:
        return 0, {}
    states = [checkpoint[name] for name in ('optimizer', 'muon') if checkpoint.get(name)]
    if len(states) != len(optimizers):
        raise UserError(f"{path} was trained {'with' if len(states) > 1 else 'without'} Muon: resume with --muon_lr={'more than 0' if len(states) > 1 else '0'}")
    for optimizer, state in zip(optimizers, states):  # the moments from the checkpoint, but the weight decay and betas of this run's config
        optimizer.load_state_dict({**state, 'param_groups': optimizer.state_dict()['param_groups']})
    if checkpoint['scaler']:  # empty, unless it was float16
        scaler.load_state_dict(checkpoint['scaler'])
    run = {'id': None, 'last_eval': checkpoint['iter_num'], 'loss_sum': 0.0, 'loss_count': 0, **checkpoint['run'], 'best_val_loss': checkpoint['best_val_loss']}
    if max(checkpoint['iter_num'], run['last_eval'] + 1) > config.max_iters:
        raise UserError(f"{path} has done all {checkpoint['iter_num']} iterations: raise --max_iters to go on")
    changed = [f'{name} was {theirs[name]}, is {getattr(config, name)}' for name in ('data_dir', 'seed') if theirs[name] != getattr(config, name)]
    if changed and int(os.environ.get('RANK', 0)) == 0:
        print(f"note: this is not what {path} was made with: {'; '.join(changed)}")
    return checkpoint['iter_num'], run


def catch_signals(world_size):
    """-> a list that gets the numbers of the signals that ask for an end: Ctrl-C, SIGTERM, a closed terminal. A second one ends it at once."""
    caught = []

    def handler(number, frame):
        if caught and world_size == 1:  # torchrun passes on what all processes of a terminal have got already
            raise KeyboardInterrupt
        caught.append(number)
        if number == getattr(signal, 'SIGHUP', None):  # there is no terminal to print to any more
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, handler)
    return caught


def main(argv=None):
    config = extras.load_config(TrainConfig, argv, description='Train a GPT to paint.')

    # one process, or one of several under torchrun
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    check(config, world_size)
    device = extras.pick_device(config.device)
    if world_size > 1:
        if device.startswith('cuda'):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        device = 'cpu' if device == 'mps' else device
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    master = rank == 0
    dtype = extras.pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.split(':')[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)
    compile_it = extras.pick_compile(config.compile, device)
    torch.set_float32_matmul_precision('high')  # TF32 where there is any
    say = functools.partial(print, flush=True) if master else lambda *_: None

    # data: one image a row
    meta = extras.load_meta(config.data_dir)
    train_data, val_data = (extras.load_tokens(config.data_dir, split, meta) for split in ('train', 'val'))
    log_path, latest_path = os.path.join(config.out_dir, 'log.csv'), os.path.join(config.out_dir, 'ckpt_latest.pt')

    # model and optimiser, new or from a checkpoint
    torch.manual_seed(config.seed)
    model_args = dict(block_size=meta['tokens_per_image'] - (not config.start_embedding), vocab_size=meta['vocab_size'],
                      width=meta['width'], **{f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)})
    try:
        raw_model = GPT(GPTConfig(**model_args))
    except ValueError as e:
        raise UserError(str(e)) from None
    raw_model.to(device)  # kept by this name: torch.compile and DDP change those of the weights
    averaged_model = copy.deepcopy(raw_model) if config.average else raw_model  # what is evaluated, painted with and saved
    optimizers = raw_model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2), config.muon_lr)
    peaks = [optimizer.param_groups[0]['lr'] for optimizer in optimizers]
    iteration, run, own = 0, {}, False
    if config.init_from != 'scratch':
        path = find_checkpoint(config)
        iteration, run = restore(path, config, meta, model_args, raw_model, averaged_model, optimizers, scaler, device)
        own = bool(run) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(config.out_dir)
        say(f'going on from {path}, iteration {iteration}' if run else f'a new run with the weights of {path}')
    seconds, last_eval, loss_count = run.get('seconds', 0), run.get('last_eval', 0), run.get('loss_count', 0)
    loss_sum = torch.tensor(run.get('loss_sum', 0.0), device=device)  # since the last log line
    run_id, best_val_loss, best_iter, saved = uuid.uuid4().hex, math.inf, None, []  # the id tells a run's checkpoints from those of another
    if own:
        run_id, best_val_loss, best_iter, saved = (run[name] for name in ('id', 'best_val_loss', 'best_iter', 'saved'))

    # a run that lies in the folder already is not touched
    if master:
        lock = extras.lock(config.out_dir)  # noqa: F841, held until the end
        heads = extras.checkpoint_heads(config.out_dir)
        old = [path for path, head in heads.items() if head['run'] and (head['run'].get('id') != run_id or head['iter_num'] > iteration)]
        if not own and logged(log_path):
            old.append(log_path)
        if old and not config.overwrite:
            raise UserError(f"{config.out_dir} holds a run ({', '.join(map(os.path.basename, old[:4]))}{', ...' * (len(old) > 4)}): go on with it by --init_from=resume, "
                            'choose another --out_dir, or replace it by --overwrite=True')

    model = raw_model
    if compile_it:
        say('compiling the model, which takes up to a minute')
        model = torch.compile(model)
    if world_size > 1:
        model = DDP(model, device_ids=[device] if device.startswith('cuda') else None)

    positions = sum(p.numel() for p in raw_model.parameters()) - raw_model.num_params()
    say(f"{raw_model.num_params() / 1e6:.2f}M parameters (and {positions / 1e6:.2f}M for positions) on {world_size} x {device}, "
        f"{str(dtype).removeprefix('torch.')}{', compiled' if compile_it else ''}")
    say(f"{len(train_data):,} training and {len(val_data):,} validation images of {meta['width']}x{meta['height']} from {config.data_dir}; "
        f"{config.max_iters:,} iterations of {config.batch_size} images are {config.max_iters * config.batch_size / len(train_data):.2f} epochs")
    share = config.batch_size // world_size  # images of this process
    micro = share // config.gradient_accumulation_steps
    if compile_it:
        try:
            with autocast:
                model(get_batch(train_data, range(micro), config, meta, device)).backward()
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as e:  # no compiler, or one that does not work
            raise UserError(f'torch.compile does not work here ({extras.brief(e)}): use --compile=False') from None
        raw_model.zero_grad(set_to_none=True)
    wandb = start_wandb(config) if master and config.wandb_log else None
    if master:  # whatever can fail has not: from here on files are written
        partial = [glob.glob(os.path.join(glob.escape(config.out_dir), folder, '*.partial')) for folder in ('', 'images')]
        for path in sum(partial, old):  # what a run that was killed has left, too
            os.remove(path)
        start_log(log_path, iteration if own else 0)

    def log(name, loss):
        """One row of log.csv, of the train_loss or the val_loss."""
        values = {'iteration': iteration, 'images': iteration * config.batch_size, 'tokens': iteration * config.batch_size * meta['tokens_per_image'],
                  'seconds': round(seconds, 2), 'learning_rate': float(f'{get_lr(iteration - 1, config):.4g}'),
                  name: round(loss, 5), 'bits_per_pixel': round(loss / math.log(2), 5)}
        with extras.room_in(config.out_dir), open(log_path, 'a') as f:
            f.write(','.join(str(values.get(c, '')) for c in COLUMNS) + '\n')
        if wandb:
            values[f'{name}_bits'] = values.pop('bits_per_pixel')  # both losses may come at one step
            wandb.log(values, step=iteration)

    def stop_if_not_finite(loss):
        if not math.isfinite(loss):
            last = f'{config.out_dir}/ckpt{saved[-1]}.pt is the last good checkpoint' if saved else 'there is no checkpoint yet'
            raise UserError(f'the loss is {loss} at iteration {iteration}; {last}. Try a lower --learning_rate (now {config.learning_rate:g}), '
                            'a longer --warmup_iters, or --dtype=float32')

    def save(path):
        """Everything from which the run can go on exactly."""
        extras.save_checkpoint(dict(
            model=averaged_model.state_dict(), training_model=raw_model.state_dict() if config.average else None, optimizer=optimizers[0].state_dict(),
            muon=optimizers[1].state_dict() if config.muon_lr else None, scaler=scaler.state_dict(), model_args=model_args,
            iter_num=iteration, best_val_loss=best_val_loss, config=asdict(config), height=meta['height'], width=meta['width'],
            run=dict(id=run_id, seconds=seconds + time.monotonic() - window, best_iter=best_iter, saved=saved, last_eval=last_eval,
                     loss_sum=loss_sum.item(), loss_count=loss_count)), path)

    first, window_first, caught = iteration, iteration, catch_signals(world_size)
    began = window = last_save = time.monotonic()  # window: since the last log line, less evaluations
    model.train()
    while True:
        last_step = iteration == config.max_iters
        eval_step = iteration > last_eval and (last_step or iteration in config.eval_at or (config.eval_interval > 0 and iteration % config.eval_interval == 0))

        # a log line tells the mean of the losses since the one before
        if loss_count and (eval_step or iteration % config.log_interval == 0):
            mean = loss_sum / loss_count
            if world_size > 1:
                dist.all_reduce(mean)
            train_loss = mean.item() / world_size
            took = time.monotonic() - window
            seconds += took
            stop_if_not_finite(train_loss)
            images = (iteration - window_first) * config.batch_size / took
            left = (time.monotonic() - began) / max(1, iteration - first) * (config.max_iters - iteration)
            say(f"iter {iteration} | loss {train_loss:.4f} | {train_loss / math.log(2):.3f} bits/pixel | {images:.2f} images/s | "
                f"{images * meta['tokens_per_image']:,.0f} tokens/s | {datetime.timedelta(seconds=int(left))} left")
            if master:
                log('train_loss', train_loss)
            loss_sum.zero_()
            loss_count, window, window_first = 0, time.monotonic(), iteration
        elif iteration == first + 1:  # something to see before the first log line
            say(f'iter {iteration} | loss {loss_sum.item() / loss_count:.4f} | {time.monotonic() - window:.1f} s')

        # evaluation: the loss over all validation images, a sheet of samples, a checkpoint
        if eval_step and (val_loss := evaluate(averaged_model, val_data, config, device, autocast, rank, world_size, caught)) is not None:
            window = time.monotonic()
            stop_if_not_finite(val_loss)
            last_eval = iteration
            if val_loss < best_val_loss:
                best_val_loss, best_iter = val_loss, iteration
            saved.append(iteration)
            if master:
                log('val_loss', val_loss)
                path = os.path.join(config.out_dir, f'ckpt{iteration}.pt')
                save(path)
                # the oldest ones go, but never the best nor the last; what other runs have left here is not touched
                while len(saved) > config.keep_checkpoints and (old := next((i for i in saved[:-1] if i != best_iter), None)):
                    saved.remove(old)
                    extras.remove(os.path.join(config.out_dir, f'ckpt{old}.pt'))
                extras.remove(latest_path)
                plot_log(log_path, os.path.join(config.out_dir, 'loss.png'))
                picture = os.path.join(config.out_dir, 'images', f'output{iteration}.png')
                paint_samples(averaged_model, val_data, config, meta, picture, caught)
                say(f"iter {iteration} | validation loss {val_loss:.4f} | {val_loss / math.log(2):.3f} bits/pixel"
                    f"{' | the best so far' if best_iter == iteration else ''} | {path} | {picture}")
            window = last_save = time.monotonic()
        if last_step and last_eval == iteration:
            break

        # a checkpoint when it is time, or when a signal was caught; all processes do the same
        wish = 2 if caught else 1 if 0 < config.save_every_minutes * 60 < time.monotonic() - last_save else 0
        if world_size > 1:
            wishes = torch.tensor(wish)
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
            wish = wishes.item()
        if wish and iteration not in saved:
            stop_if_not_finite(sum(p.sum().item() for p in raw_model.parameters()))
            if master:
                save(latest_path)
            last_save = time.monotonic()
        if wish == 2:
            break

        # one step. Dropout too is a function of (seed, iteration, rank): a checkpoint needs no random state
        torch.manual_seed(config.seed + iteration * world_size + rank)
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group['lr'] = get_lr(iteration, config) / config.learning_rate * peak
        for step in range(config.gradient_accumulation_steps):
            start = iteration * config.batch_size + rank * share + step * micro
            tokens = get_batch(train_data, range(start, start + micro), config, meta, device)
            if world_size > 1:  # the ranks share their gradients in the last backward pass only
                model.require_backward_grad_sync = step == config.gradient_accumulation_steps - 1
            with autocast:
                loss = model(tokens) / config.gradient_accumulation_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        for optimizer in optimizers:
            if not scaler.is_enabled() or norm.isfinite():  # in float16, what overflows for one would spoil the other's clipped gradients
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        loss_count += 1
        iteration += 1
        if config.average:
            update_average(averaged_model, raw_model, iteration, config.average)

    if last_step and last_eval == iteration:
        say(f'done: best validation {best_val_loss / math.log(2):.3f} bits/pixel at iteration {best_iter}. Paint with  python sample.py --ckpt ' + shlex.quote(f'{config.out_dir}/ckpt{best_iter}.pt'))
        caught.clear()
    else:
        again, words = [], iter(sys.argv)
        for word in words:
            if word in ('--init_from', '--overwrite'):
                next(words)  # its value
            elif not word.startswith(('--init_from=', '--overwrite=')):
                again.append(word)
        say(f"\nstopped at iteration {iteration}. Go on with  {'python' if world_size == 1 else 'torchrun ...'} {shlex.join(again)} --init_from=resume")
        caught.append(signal.SIGTERM)  # if it was another process that has got it
    if world_size > 1:
        dist.barrier()  # nobody leaves while another still evaluates
        model = loss = None  # what they hold of the process group would be freed after it, which now and then never ends
        dist.destroy_process_group()
    if caught:
        sys.exit(128 + caught[0])


if __name__ == '__main__':
    extras.run(main)

"""Train a GPT to paint.

    python train.py config/landscape.py                             # the keys below, overridden by the file ...
    python train.py config/landscape.py --batch_size=2              # ... and then by the command line
    python train.py config/landscape.py --init_from=resume          # continue from the last checkpoint
    torchrun --standalone --nproc_per_node=8 train.py config/landscape.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 train.py config/landscape_gpu.py
"""
import contextlib
import copy
import csv
import datetime
import functools
import glob
import math
import os
import signal
import sys
import time
import uuid
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields

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
    """Every key of a config file: its type, its default, what it means (this is what --help prints), and its range."""
    # files
    data_dir: str = key('data/landscape', 'the data set: a folder that prepare.py has filled')
    out_dir: str = key('out', 'checkpoints, log.csv, loss.png and images/ go here')
    init_from: str = key('scratch', "'scratch', 'resume' (the last checkpoint in out_dir), or a checkpoint or folder: "
                                    'its run goes on with the same pictures; with others, or from weights alone, as in '
                                    'out/ckpt6000.pt, a new run starts')
    overwrite: bool = key(False, 'replace a run in out_dir: its log and its checkpoints are removed')
    save_every_minutes: float = key(15.0, 'minutes between writes of ckpt_latest.pt (0: only at a stop)', '0 or more')
    keep_checkpoints: int = key(10, 'checkpoints of a run that stay on disk; the best one always does', 'more than 0')
    # the model
    n_layer: int = key(4, 'transformer blocks', 'more than 0')
    n_head: int = key(4, 'attention heads of a block', 'more than 0')
    n_embd: int = key(128, 'width of the residual stream', 'more than 0')
    dropout: float = key(0.0, 'probability of dropout in training', '0 or more and less than 1')
    start_embedding: bool = key(True, 'learn an embedding before the first pixel, so that this is predicted, too')
    row_column_positions: bool = key(False, 'an embedding of the row plus one of the column, not one of each position')
    neighbours: int = key(0, 'how many of the nearest known pixels (24 at most) a small MLP feeds into the first block')
    relative_neighbours: bool = key(False, 'the MLP also reads by how much neighbours that touch differ, as numbers')
    n_colour: int = key(0, 'dimension of the colour embeddings, projected to n_embd and back (0: n_embd)', '0 or more')
    relative_colours: bool = key(False, 'the head also scores how far each channel is from the left and upper pixel')
    relative_chroma: bool = key(False, '... and how far red - green and blue - green are')
    attention: str = key('full', 'what the layers attend to, in turn: all earlier pixels (full), the same row and the '
                                 "one above (local), the same column (column), as in 'local column'")
    reach: int = key(0, 'columns to the right that local attention sees in the row above (0: all); rows then begin '
                        'with the start embedding, and sample.py paints along diagonals')
    alibi: bool = key(False, 'local and column attention fade with distance, each head at its own rate')
    exclusive: bool = key(False, "attention adds only what is orthogonal to a position's own value")
    # the optimiser
    batch_size: int = key(40, 'images an iteration, over all processes and accumulation steps', 'more than 0')
    gradient_accumulation_steps: int = key(1, 'micro-batches of an iteration, to save memory', 'more than 0')
    max_iters: int = key(10000, 'iterations', 'more than 0')
    learning_rate: float = key(6e-4, "AdamW's peak: linear warm-up, cosine decay", 'more than 0')
    min_lr: float = key(6e-5, "AdamW's rate at max_iters; Muon's falls in proportion", '0 or more')
    muon_lr: float = key(0.0, 'peak for all other matrices than embeddings, with Muon (0: AdamW)', '0 or more')
    warmup_iters: int = key(200, 'iterations of the warm-up', '0 or more')
    weight_decay: float = key(0.1, 'of embeddings and matrices, by AdamW and Muon', '0 or more')
    beta1: float = key(0.9, 'decay of the first moment in AdamW', '0 or more and less than 1')
    beta2: float = key(0.95, 'decay of the second moment in AdamW', '0 or more and less than 1')
    grad_clip: float = key(1.0, 'clip the norm of the gradient to this (0: never)', '0 or more')
    average: float = key(0.0, 'evaluate, paint with and save averaged weights, whose mean age is this fraction of the '
                              'iterations so far (0: the newest weights)', '0 or more and less than 1')
    flip: bool = key(True, 'mirror half of the images, chosen anew in each epoch')
    # evaluation and logging
    eval_interval: int = key(0, 'iterations between evaluations (0: at eval_at and at the end only)', '0 or more')
    eval_at: tuple = key((), 'evaluate at these iterations too, as in (200, 400, 800)')
    eval_batch_size: int = key(4, 'validation images at a time; affects memory only', 'more than 0')
    num_samples: int = key(16, 'images on the sheet of samples that every evaluation paints', 'more than 0')
    temperature: float = key(1.0, 'of those samples, and of sample.py unless told otherwise: low is calm', '0 or more')
    log_interval: int = key(10, 'iterations between two log lines', 'more than 0')
    wandb_log: bool = key(False, 'log to Weights & Biases as well (pip install wandb)')
    wandb_project: str = key('pixelgpt', 'its project')
    wandb_run_name: str = key('landscape', 'its name of the run')
    # the machine
    seed: int = key(1337, 'decides initial weights, order of the images, noise of the samples', 'from 0 to 2 ** 63 - 1')
    device: str = key('auto', "'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    dtype: str = key('auto', "'float32', 'bfloat16', 'float16', or 'auto': bfloat16 where a GPU, or a CPU with AMX "
                             'or AVX512-BF16, has it; else float16 with a loss scaler on CUDA; else float32')
    compile: bool | str = key('auto', "torch.compile: True, False, or 'auto' (on CUDA)")

# -----------------------------------------------------------------------------
# data

@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, images):
    """Return a new order of all images and which of them to mirror, a pure function of (seed, epoch)."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(images), rng.random(images) < 0.5


def get_batch(data, indices, config, meta, device):
    """Return the images at indices of the endless sequence of epochs, (B, T) int64: inputs and targets in one."""
    rows = []
    for index in indices:
        epoch, i = divmod(index, len(data))
        order, mirrored = epoch_order(config.seed, epoch, len(data))
        row = data[order[i]].reshape(meta['height'], meta['width'])
        rows.append(row[:, ::-1] if config.flip and mirrored[i] else row)
    return to_device(np.stack(rows).reshape(len(rows), -1), device)


def to_device(tokens, device):
    """Return an array of tokens (B, T) as int64 tensor on device. Raises UserError."""
    if tokens.max() >= extras.VOCAB_SIZE:
        raise UserError(f'the data hold the token {tokens.max()}, which is no 12-bit colour: prepare them again')
    tokens = torch.from_numpy(tokens.astype(np.int64))
    return tokens.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else tokens.to(device)

# -----------------------------------------------------------------------------
# schedule and averaged weights (the optimisers are in model.py, where the parameters have their names)

def get_lr(iteration, config):
    """Return the learning rate of an iteration: linear warm-up from near 0, then half a cosine down to min_lr."""
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    ratio = (iteration - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


@torch.no_grad()
def update_average(averaged_model, model, iteration, mean_age):
    """Take the weights of model after an iteration (from 1 on) into an average; mean_age is a fraction of iteration.

    The power-law average of Karras et al. 2023 (arXiv 2312.02696): its window grows with the run, so that an early
    checkpoint gets a short one.
    """
    # weights of iteration i count like i ** (1 / mean_age - 2): their mean age is mean_age * iteration
    beta = (1 - 1 / iteration) ** (1 / mean_age - 1)
    torch._foreach_lerp_(list(averaged_model.parameters()), list(model.parameters()), 1 - beta)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate(model, data, config, machine, signals):
    """Return the mean loss in nats over every predicted pixel of all images in data; None if a signal came meanwhile.

    Each process takes its share of the images.
    """
    model.eval()
    shard, size, total, count = data[machine.rank::machine.world_size], config.eval_batch_size, 0.0, 0
    for i in tqdm(range(0, len(shard), size), desc='validation', leave=False, disable=machine.rank > 0 or None):
        if signals:
            break
        tokens = to_device(shard[i:i + size], machine.device)
        with machine.autocast():
            total += model(tokens).item() * len(tokens)
        count += len(tokens)
    if machine.world_size > 1:
        sums = torch.tensor([total, count], dtype=torch.float64, device=machine.device)
        dist.all_reduce(sums)
        total, count = sums.tolist()
    model.train()
    return total / count if count == len(data) else None


def save_samples(path, model, data, config, meta, signals):
    """Paint num_samples images, with the same noise at every evaluation, and save a sheet. False if a signal came."""
    prompts = np.zeros((config.num_samples, 0))
    if not config.start_embedding:  # the first pixels of real images
        prompts = np.resize(data[:config.num_samples, :1], (config.num_samples, 1))
    total = len(prompts) * (meta['tokens_per_image'] - prompts.shape[1])
    generator = torch.Generator().manual_seed(config.seed)
    with tqdm(total=total, desc='painting', unit='px', unit_scale=True, leave=False, disable=None) as bar:
        def progress(pixels, images):
            bar.update(pixels)
            if signals:
                raise KeyboardInterrupt  # the only way out of generate

        try:
            tokens = model.generate(prompts, temperature=config.temperature, generator=generator, progress=progress)
        except KeyboardInterrupt:
            return False
    images = tokens.reshape(-1, meta['height'], meta['width'])
    extras.save_picture(extras.sheet([extras.to_image(image, scale=2) for image in images]), path)
    return True

# -----------------------------------------------------------------------------
# the log

LOG_COLUMNS = ['iteration', 'images', 'tokens', 'seconds', 'learning_rate', 'train_loss', 'val_loss', 'bits_per_pixel']


def read_log(path):
    """Return the rows of a log.csv, if there is one, without its header and without a row that was cut short."""
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        return [row for row in f if row.split(',')[0].isdigit() and row.endswith('\n')]
    return []


class Log:
    """log.csv, its plot loss.png, and Weights & Biases if the config asks for it."""

    def __init__(self, config, meta, wandb, iteration):
        """Start a log, or continue one: its rows after that iteration are dropped."""
        self.config, self.meta, self.wandb = config, meta, wandb
        self.path = os.path.join(config.out_dir, 'log.csv')
        rows = [row for row in read_log(self.path) if int(row.split(',')[0]) <= iteration]
        with extras.atomic_write(self.path) as f:
            f.write((','.join(LOG_COLUMNS) + '\n' + ''.join(rows)).encode())

    def write(self, run, name, loss):
        """Add a row with the train_loss or the val_loss."""
        images = run.iteration * self.config.batch_size
        lr = float(f'{get_lr(run.iteration - 1, self.config):.4g}')
        values = {'iteration': run.iteration, 'images': images, 'tokens': images * self.meta['tokens_per_image'],
                  'seconds': round(run.seconds, 2), 'learning_rate': lr, name: round(loss, 5),
                  'bits_per_pixel': round(loss / math.log(2), 5)}
        with extras.room_in(self.config.out_dir), open(self.path, 'a') as f:
            f.write(','.join(str(values.get(c, '')) for c in LOG_COLUMNS) + '\n')
        if self.wandb:
            values[f'{name}_bits'] = values.pop('bits_per_pixel')  # both losses may come at one step
            self.wandb.log(values, step=run.iteration)

    def plot(self):
        """Write loss.png: bits per pixel over images seen."""
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot as plt
        with open(self.path, newline='') as f:
            rows = list(csv.DictReader(f))
        figure, axes = plt.subplots(figsize=(8, 5))
        for column, style, alpha, label in (('train_loss', '-', 0.6, 'training batches'),
                                            ('val_loss', 'o-', 1, 'validation, all images')):
            points = [(int(row['images']), float(row['bits_per_pixel'])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points), style, label=label, linewidth=1, alpha=alpha)
        axes.set(xlabel='images seen', ylabel='bits per pixel (12.0 is a uniform guess)')
        axes.grid(alpha=0.3)
        axes.legend()
        with extras.atomic_write(os.path.join(self.config.out_dir, 'loss.png')) as f:
            figure.savefig(f, format='png', dpi=100, bbox_inches='tight')
        plt.close(figure)


def start_wandb(config):
    """Return the module wandb with a run begun. Raises UserError."""
    try:
        import wandb
        wandb.init  # a folder called wandb is no module
    except (ImportError, AttributeError):
        raise UserError('--wandb_log=True needs wandb: pip install wandb') from None
    try:
        wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))
    except Exception as e:  # no key, no network
        raise UserError(f'wandb cannot start ({extras.brief(e)}): run  wandb login , or omit --wandb_log') from None
    return wandb

# -----------------------------------------------------------------------------
# a run: starting, saving and restoring it

@dataclass
class Run:
    """All that changes while a run goes on, and all that its checkpoints hold."""
    model: GPT  # never compiled or wrapped, so that its weights keep their names
    averaged_model: GPT  # evaluated, painted with and saved; the model itself if weights are not averaged
    optimizers: list  # AdamW, and perhaps Muon
    scaler: torch.amp.GradScaler
    loss_sum: torch.Tensor  # over loss_count iterations, since the last log line
    loss_count: int = 0
    iteration: int = 0
    seconds: float = 0.0  # of training, without evaluations
    last_eval: int = 0  # iteration of the last evaluation, which a resumed run does not repeat
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # to tell its checkpoints from those of another run
    best_val_loss: float = math.inf
    best_iter: int | None = None
    saved: list = field(default_factory=list)  # iterations of its checkpoints on disk


def start_run(config, meta, machine):
    """Return a new run with random weights. Raises UserError."""
    sizes = dict(block_size=meta['tokens_per_image'] - (not config.start_embedding), width=meta['width'])
    switches = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    torch.manual_seed(config.seed)
    try:
        model = GPT(GPTConfig(**sizes, **switches))
    except ValueError as e:
        raise UserError(str(e)) from None
    model.to(machine.device)
    betas = config.beta1, config.beta2
    return Run(model, averaged_model=copy.deepcopy(model) if config.average else model,
               optimizers=model.configure_optimizers(config.weight_decay, config.learning_rate, betas, config.muon_lr),
               scaler=torch.amp.GradScaler('cuda', enabled=machine.dtype == torch.float16),
               loss_sum=torch.zeros((), device=machine.device))


def save_run(path, run, config, meta, seconds):
    """Write a checkpoint: all from which the run can continue exactly. seconds: of training so far."""
    extras.save_checkpoint(dict(
        # nanoGPT's names where it has them
        model=run.averaged_model.state_dict(), training_model=run.model.state_dict() if config.average else None,
        optimizer=run.optimizers[0].state_dict(), muon=run.optimizers[1].state_dict() if config.muon_lr else None,
        scaler=run.scaler.state_dict(), model_args=asdict(run.model.config), iter_num=run.iteration,
        best_val_loss=run.best_val_loss, config=asdict(config), height=meta['height'], width=meta['width'],
        run=dict(id=run.id, checksum=meta['checksum'], seconds=seconds, best_iter=run.best_iter, saved=run.saved,
                 last_eval=run.last_eval, loss_sum=run.loss_sum.item(), loss_count=run.loss_count)), path)


def save_evaluated(run, config, meta):
    """Write ckpt<iteration>.pt, and remove ckpt_latest.pt and the oldest of too many checkpoints. Return its path."""
    path = os.path.join(config.out_dir, f'ckpt{run.iteration}.pt')
    save_run(path, run, config, meta, run.seconds)
    # the best one and the last one stay, and whatever other runs have left here
    too_many = max(0, len(run.saved) - config.keep_checkpoints)
    for oldest in [i for i in run.saved[:-1] if i != run.best_iter][:too_many]:
        run.saved.remove(oldest)
        extras.remove(os.path.join(config.out_dir, f'ckpt{oldest}.pt'))
    extras.remove(os.path.join(config.out_dir, 'ckpt_latest.pt'))
    return path


def find_checkpoint(config):
    """Return the checkpoint that --init_from means, in a folder the one with most iterations. Raises UserError."""
    folder = config.out_dir if config.init_from == 'resume' else config.init_from
    if config.init_from != 'resume' and not os.path.isdir(folder):
        return config.init_from
    heads = extras.checkpoint_heads(folder)
    runs = {}
    for path, head in heads.items():
        if head['run']:  # not weights alone
            runs.setdefault(head['run'].get('id'), []).append(path)
    if not runs and heads:
        weights = next(iter(heads))
        raise UserError(f'nothing to resume: {weights} holds weights alone; --init_from={extras.quote(weights)} starts '
                        'a new run with them')
    if not runs:
        raise UserError(f'nothing to resume: no checkpoint in {folder}; leave --init_from out to start')
    if len(runs) > 1:
        names = '; '.join(', '.join(map(os.path.basename, paths)) for paths in runs.values())
        raise UserError(f'{folder} holds checkpoints of {len(runs)} runs ({names}): name the one to go on from, as in '
                        '--init_from=' + extras.quote(next(iter(runs.values()))[0]))
    [paths] = runs.values()
    return max(paths, key=lambda path: heads[path]['iter_num'])


def restore_run(path, run, config, meta, machine):
    """Load a checkpoint into a run. Return whether that continues the run in out_dir. Raises UserError.

    A checkpoint that holds weights alone, or was made with other pictures, gives its weights to a new run.
    """
    checkpoint = extras.load_checkpoint(path, machine.device)
    saved = checkpoint.get('run', {})
    others = saved.get('checksum', meta['checksum']) != meta['checksum']
    resized = (checkpoint['height'], checkpoint['width']) != (meta['height'], meta['width'])
    if resized and config.init_from == 'resume':
        raise UserError(f"{path} paints {checkpoint['width']}x{checkpoint['height']} pixels, {config.data_dir} holds "
                        f"{meta['width']}x{meta['height']}: resume with the data it was made with")
    resume = config.init_from == 'resume' or bool(saved) and not resized and not others
    theirs, ours = {**asdict(GPTConfig()), **checkpoint['model_args']}, asdict(run.model.config)
    if resume:  # the order of the images depends on it
        theirs['batch_size'], ours['batch_size'] = checkpoint['config']['batch_size'], config.batch_size
    may_differ = ['dropout', *(['block_size', 'width'] if resized and config.row_column_positions else [])]
    # block_size and width last: the data decide them, so that a key of the config is the better one to name
    sizes_last = sorted(ours.items(), key=lambda item: item[0] in ('block_size', 'width'))
    for name, value in sizes_last:
        if theirs[name] != value and name not in may_differ:
            advice = 'resume with the config (and data)' if resume else 'use the config'
            raise UserError(f'{path} has {name}={theirs[name]}, this run {name}={value}: {advice} it was made with')
    weights = checkpoint['model']
    with extras.fitting(path):
        if resized:  # the positions of rows and columns are stretched
            for name in ('transformer.wre.weight', 'transformer.wce.weight'):
                rows = len(run.model.get_parameter(name))
                weights[name] = F.interpolate(weights[name].T[None], rows, mode='linear', align_corners=True)[0].T
        run.averaged_model.load_state_dict(weights)  # first, since it may be the same model
        run.model.load_state_dict(resume and checkpoint.get('training_model') or weights)
    if not resume:
        machine.print(f'a new run with the weights of {path}')
        return False

    states = [checkpoint[name] for name in ('optimizer', 'muon') if checkpoint.get(name)]
    if len(states) != len(run.optimizers):
        was, now = ('with', 'more than 0') if len(states) > 1 else ('without', '0')
        raise UserError(f'{path} was trained {was} Muon: resume with --muon_lr={now}')
    for optimizer, state in zip(run.optimizers, states):  # the moments; weight decay and betas are those of this config
        optimizer.load_state_dict({**state, 'param_groups': optimizer.state_dict()['param_groups']})
    if checkpoint['scaler']:  # empty, unless it was float16
        run.scaler.load_state_dict(checkpoint['scaler'])
    # at max_iters it may still lack its last evaluation, which a signal has cut short
    if max(checkpoint['iter_num'], saved['last_eval'] + 1) > config.max_iters:
        raise UserError(f"{path} has done all {checkpoint['iter_num']} iterations: raise --max_iters to go on")
    run.iteration, run.seconds, run.last_eval = checkpoint['iter_num'], saved['seconds'], saved['last_eval']
    run.loss_sum.fill_(saved['loss_sum'])
    run.loss_count = saved['loss_count']
    continues = os.path.realpath(os.path.dirname(path)) == os.path.realpath(config.out_dir)
    if continues:
        run.id, run.best_val_loss = saved['id'], checkpoint['best_val_loss']
        run.best_iter, run.saved = saved['best_iter'], saved['saved']
    machine.print(f'going on from {path}, iteration {run.iteration}')
    was, changed = checkpoint['config'], []
    if others:
        changed.append(f"the pictures are others (data_dir was {was['data_dir']}, is {config.data_dir})")
    if was['seed'] != config.seed:
        changed.append(f"seed was {was['seed']}, is {config.seed}")
    if changed:
        machine.print(f"note: this is not what {path} was made with: {'; '.join(changed)}")
    return continues


def claim_folder(config, run, continues):
    """Lock out_dir, and refuse another run in it unless told to overwrite. Return the lock and the files to remove.

    Nothing is removed yet, and nothing but the lock is written. It holds as long as the returned object lives.
    """
    lock = extras.lock(config.out_dir)
    old = [path for path, head in extras.checkpoint_heads(config.out_dir).items() if head['run'] and
           (head['run'].get('id') != run.id or head['iter_num'] > run.iteration)]
    log_path = os.path.join(config.out_dir, 'log.csv')
    if not continues and read_log(log_path):
        old.append(log_path)
    if old and not config.overwrite:
        names = ', '.join(map(os.path.basename, old[:4])) + ', ...' * (len(old) > 4)
        resume = 'go on with it by --init_from=resume, ' if any(path.endswith('.pt') for path in old) else ''
        raise UserError(f'{config.out_dir} holds a run ({names}): {resume}choose another --out_dir, or replace it by '
                        '--overwrite=True')
    for name in ('ckpt*', 'log.csv*', 'loss.png*', 'images/output*'):  # left by a run that was killed
        old += glob.glob(os.path.join(glob.escape(config.out_dir), name + '.partial'))
    return lock, old


def stop_if_not_finite(loss, run, config):
    """Raise UserError if the loss is infinite or not a number."""
    if not math.isfinite(loss):
        last = 'there is no checkpoint yet'
        if run.saved:
            last = f'{config.out_dir}/ckpt{run.saved[-1]}.pt is the last good checkpoint'
        muon = f' or --muon_lr (now {config.muon_lr:g})' if config.muon_lr else ''
        raise UserError(f'the loss is {loss} at iteration {run.iteration}; {last}. Try a lower --learning_rate (now '
                        f'{config.learning_rate:g}){muon}, a longer --warmup_iters, or --dtype=float32')

# -----------------------------------------------------------------------------
# the machine

@dataclass
class Machine:
    """Where this process runs: alone, or as one of several under torchrun."""
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype
    compile: bool

    def autocast(self):
        """Return a context in which products are computed in dtype."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.split(':')[0], self.dtype) if enabled else contextlib.nullcontext()

    def print(self, *words):
        """Print on the first process only."""
        if self.rank == 0:
            print(*words, flush=True)


def set_up_machine(config):
    """Choose device and precision, and join the other processes under torchrun. Raises UserError."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    pieces = world_size * config.gradient_accumulation_steps
    extras.check_values(config, batch_size=(
        f'a multiple of {pieces}: {world_size} processes x --gradient_accumulation_steps='
        f'{config.gradient_accumulation_steps}', config.batch_size % pieces == 0))
    device = extras.pick_device(config.device)
    if world_size > 1:
        if device.startswith('cuda'):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        device = 'cpu' if device == 'mps' else device
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    # float32 stays what it is: in TF32, which set_float32_matmul_precision allows, Muon's iteration goes astray
    return Machine(rank, world_size, device, extras.pick_dtype(config.dtype, device),
                   extras.pick_compile(config.compile, device))


def compile_and_wrap(model, tokens, machine):
    """Compile the model if the machine says so, trying it on tokens (B, T), and wrap it for several processes."""
    compiled = model
    if machine.compile:
        machine.print('compiling the model, which takes up to a minute')
        warnings.filterwarnings('ignore', 'TensorFloat32')  # it recommends what set_up_machine leaves alone
        compiled = torch.compile(model)
    if machine.world_size > 1:
        devices = [machine.device] if machine.device.startswith('cuda') else None
        compiled = DDP(compiled, device_ids=devices, broadcast_buffers=False)  # buffers never change
    if machine.compile:
        try:
            with machine.autocast():
                compiled(tokens).backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # no compiler, or one that does not work
            raise UserError(f'torch.compile does not work here ({extras.brief(e)}): use --compile=False') from None
        model.zero_grad(set_to_none=True)
    return compiled


def catch_signals(world_size):
    """Catch Ctrl-C, SIGTERM and a closed terminal. Return the list that they join; a second one ends all at once."""
    signals = []

    def handler(number, frame):
        if signals and world_size == 1:  # torchrun passes on what all processes of a terminal have received already
            raise KeyboardInterrupt
        signals.append(number)
        if number == getattr(signal, 'SIGHUP', None):  # there is no terminal to print to any more
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    return signals


NOTHING, SAVE, STOP = range(3)


def agree(request, world_size):
    """Return the most that a process asks for: all of them do the same."""
    if world_size > 1:
        requests = torch.tensor(request)
        dist.all_reduce(requests, dist.ReduceOp.MAX)
        return requests.item()
    return request


def resume_command(argv, world_size):
    """Return what to type to go on with this run."""
    kept, words = [], iter(argv)
    for word in words:
        if word in ('--init_from', '--overwrite'):
            next(words)  # its value
        elif not word.startswith(('--init_from=', '--overwrite=')):
            kept.append(word)
    return f"{'python' if world_size == 1 else 'torchrun ...'} {extras.quote(*kept)} --init_from=resume"

# -----------------------------------------------------------------------------

def main(argv=None):
    config = extras.load_config(TrainConfig, argv, description='Train a GPT to paint.')
    machine = set_up_machine(config)
    world_size, master_process = machine.world_size, machine.rank == 0
    meta = extras.load_meta(config.data_dir)
    train_data, val_data = (extras.load_tokens(config.data_dir, split, meta) for split in ('train', 'val'))
    # tells one data set from another: images are in the order of a hash, so that the first ones are a random choice
    meta['checksum'] = zlib.crc32(train_data[:1000], zlib.crc32(val_data))
    local_batch_size = config.batch_size // world_size
    micro_batch_size = local_batch_size // config.gradient_accumulation_steps

    run, continues = start_run(config, meta, machine), False
    if config.init_from != 'scratch':
        continues = restore_run(find_checkpoint(config), run, config, meta, machine)
    if master_process:
        lock, old_files = claim_folder(config, run, continues)  # noqa: F841, the lock is held until the end
    positions = sum(p.numel() for p in run.model.parameters()) - run.model.num_params()
    epochs = config.max_iters * config.batch_size / len(train_data)
    machine.print(f'{run.model.num_params() / 1e6:.2f}M parameters (and {positions / 1e6:.2f}M for positions) on '
                  f"{world_size} x {machine.device}, {str(machine.dtype).removeprefix('torch.')}"
                  f"{', compiled' if machine.compile else ''}")
    machine.print(f'{len(train_data):,} training and {len(val_data):,} validation images of '
                  f"{meta['width']}x{meta['height']} from {config.data_dir}; {config.max_iters:,} iterations of "
                  f'{config.batch_size} images are {epochs:.2f} epochs')
    first_tokens = get_batch(train_data, range(micro_batch_size), config, meta, machine.device)
    model = compile_and_wrap(run.model, first_tokens, machine)
    wandb = start_wandb(config) if master_process and config.wandb_log else None
    if master_process:  # all that can fail has been tried: from here on files are written
        for path in old_files:
            extras.remove(path)
        log = Log(config, meta, wandb, run.iteration if continues else 0)

    start_iteration, window_iteration, signals = run.iteration, run.iteration, catch_signals(world_size)
    start_time = window_start = last_save = time.perf_counter()  # window: since the last log line, without evaluations
    model.train()
    while True:
        last_step = run.iteration == config.max_iters
        eval_step = run.iteration > run.last_eval and (
            last_step or run.iteration in config.eval_at
            or config.eval_interval > 0 and run.iteration % config.eval_interval == 0)

        # a log line tells the mean of the losses since the one before
        if run.loss_count and (eval_step or run.iteration % config.log_interval == 0):
            mean = run.loss_sum / run.loss_count
            if world_size > 1:
                dist.all_reduce(mean)
            train_loss = mean.item() / world_size
            elapsed = time.perf_counter() - window_start
            run.seconds += elapsed
            stop_if_not_finite(train_loss, run, config)
            rate = (run.iteration - window_iteration) * config.batch_size / elapsed
            per_iteration = (time.perf_counter() - start_time) / max(1, run.iteration - start_iteration)
            left = datetime.timedelta(seconds=int(per_iteration * (config.max_iters - run.iteration)))
            machine.print(f'iter {run.iteration} | loss {train_loss:.4f} | {train_loss / math.log(2):.3f} bits/pixel | '
                          f"{rate:.2f} images/s | {rate * meta['tokens_per_image']:,.0f} tokens/s | {left} left")
            if master_process:
                log.write(run, 'train_loss', train_loss)
            run.loss_sum.zero_()
            run.loss_count, window_start, window_iteration = 0, time.perf_counter(), run.iteration
        elif run.iteration == start_iteration + 1:  # something to see before the first log line
            machine.print(f'iter {run.iteration} | loss {run.loss_sum.item() / run.loss_count:.4f} | '
                          f'{time.perf_counter() - window_start:.1f} s')

        # evaluation: the loss over all validation images (None: interrupted), a checkpoint, a sheet of samples
        val_loss = None
        if eval_step:
            val_loss = evaluate(run.averaged_model, val_data, config, machine, signals)
            window_start = time.perf_counter()
        if val_loss is not None:
            stop_if_not_finite(val_loss, run, config)
            run.last_eval = run.iteration
            if val_loss < run.best_val_loss:
                run.best_val_loss, run.best_iter = val_loss, run.iteration
            run.saved.append(run.iteration)
            if master_process:
                log.write(run, 'val_loss', val_loss)
                path = save_evaluated(run, config, meta)
                log.plot()
                picture = os.path.join(config.out_dir, 'images', f'output{run.iteration}.png')
                painted = save_samples(picture, run.averaged_model, val_data, config, meta, signals)
                best = ' | the best so far' if run.best_iter == run.iteration else ''
                machine.print(f'iter {run.iteration} | validation loss {val_loss:.4f} | {val_loss / math.log(2):.3f} '
                              f"bits/pixel{best} | {path}{f' | {picture}' if painted else ''}")
            window_start = last_save = time.perf_counter()
        done = last_step and run.last_eval == run.iteration
        if done:
            break

        # a checkpoint when it is time, or when a signal has come
        save_due = 0 < config.save_every_minutes * 60 < time.perf_counter() - last_save
        request = agree(STOP if signals else SAVE if save_due else NOTHING, world_size)
        if request and run.iteration not in run.saved:  # whose ckpt<iteration>.pt was just written
            # a weight that is no number shows before the loss does
            stop_if_not_finite(sum(p.sum().item() for p in run.model.parameters()), run, config)
            if world_size > 1:  # the checkpoint holds one sum, from which all of them go on
                dist.all_reduce(run.loss_sum)
                run.loss_sum /= world_size
            if master_process:
                save_run(os.path.join(config.out_dir, 'ckpt_latest.pt'), run, config, meta,
                         run.seconds + time.perf_counter() - window_start)
            last_save = time.perf_counter()
        if request == STOP:
            break

        # one step. Dropout too is a function of (seed, iteration, rank): a checkpoint needs no random state
        torch.manual_seed(config.seed + run.iteration * world_size + machine.rank)
        lr = get_lr(run.iteration, config)
        for optimizer, peak in zip(run.optimizers, (config.learning_rate, config.muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = lr / config.learning_rate * peak
        for micro_step in range(config.gradient_accumulation_steps):
            start = run.iteration * config.batch_size + machine.rank * local_batch_size + micro_step * micro_batch_size
            tokens = get_batch(train_data, range(start, start + micro_batch_size), config, meta, machine.device)
            if world_size > 1:  # the processes average their gradients in the last backward pass only
                model.require_backward_grad_sync = micro_step == config.gradient_accumulation_steps - 1
            with machine.autocast():
                loss = model(tokens) / config.gradient_accumulation_steps  # mean cross-entropy, GPT.forward
            run.scaler.scale(loss).backward()
            run.loss_sum += loss.detach()
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        for optimizer in run.optimizers:
            if not run.scaler.is_enabled() or grad_norm.isfinite():  # in float16 both step or neither
                run.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        run.scaler.update()
        run.loss_count += 1
        run.iteration += 1
        if config.average:
            update_average(run.averaged_model, run.model, run.iteration, config.average)

    if done:
        paths = [f'{config.out_dir}/ckpt{iteration}.pt' for iteration in (run.best_iter, run.iteration)]
        path = next(filter(os.path.exists, paths), paths[0])  # somebody may have removed the best one
        machine.print(f'done: best validation {run.best_val_loss / math.log(2):.3f} bits/pixel at iteration '
                      f'{run.best_iter}. Paint with  python sample.py --ckpt {extras.quote(path)}')
    else:
        machine.print(f'\nstopped at iteration {run.iteration}. Go on with  {resume_command(sys.argv, world_size)}')
    if world_size > 1:
        dist.barrier()  # nobody leaves while another process still evaluates
        model = loss = None  # they would release the process group after it is gone, which now and then never ends
        dist.destroy_process_group()
    if not done:
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))  # none: another process has received it


if __name__ == '__main__':
    extras.run(main)

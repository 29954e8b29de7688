"""Compare a training step of the recommended model with one of nanoGPT's: time and memory, both at 64x64.

    python bench/training.py                         # batches of 1 and 4; on a GPU 8, 32 and 128, compiled and not
    python bench/training.py --dtype float32
    python bench/training.py --batch 32 --profile    # on a GPU: where the time of a step goes
    python bench/training.py --config config/landscape_gpu.py --batch 32 --compile yes

nanoGPT's model is model.py with every switch off, the usual loss with all logits in memory, and AdamW. The switches
and the optimizers of the recommended model are those of config/landscape.py, or of --config. Both make steps on random
pixels, in turn, and the median counts; the peak is the memory of a process that has made a few steps of one model (on
a GPU, the GPU's). The model FLOPs are those of all matrix products of a step, forward and backward, as torch counts
them (attention without the mask); utilisation is their share of the 989 TFLOP/s that an H100 or H200 reaches in
bfloat16 at most. Leave the machine idle.
"""
import argparse
import contextlib
import resource
import statistics
import subprocess
import time
from dataclasses import fields

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, argument_parser, command, device_name, table_head, table_row
import extras
from model import GPT, GPTConfig
from train import TrainConfig

NAMES = 'nanoGPT', 'recommended'
PEAK_FLOPS = {'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}  # bfloat16, dense, by the datasheet
COLUMNS = ('model', 'parameters', 'batch', 'compiled', 'ms a step', 'ms an image', 'images/s', 'tokens/s', 'peak MB',
           'TFLOP/s', 'utilisation')


def stepper(which, recommended, batch, dtype, device, compiled, side=64):
    """Return a function that makes a training step on square images, the number of parameters, and a step's FLOPs."""
    path = recommended if which == 'recommended' else str(ROOT / 'config' / 'seed.py')
    config = extras.load_config(TrainConfig, [path])
    autocast = torch.autocast(device.split(':')[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    model_args = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    pixels = side ** 2
    model = GPT(GPTConfig(**model_args, width=side, block_size=pixels - (not config.start_embedding))).to(device)
    betas = config.beta1, config.beta2
    optimizers = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, config.muon_lr)

    def nanogpts_loss(tokens):
        logits = model.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.size(1):].flatten())

    loss_of = model if which == 'recommended' else nanogpts_loss
    with FlopCounterMode(display=False) as counter:
        loss_of(torch.randint(4096, (1, pixels), device=device)).backward()
        model.zero_grad()
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step():
        tokens = torch.randint(4096, (batch, pixels), device=device)
        with autocast:
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step, sum(p.numel() for p in model.parameters()), batch * counter.get_total_flops()


def seconds_of(step, steps, device):
    """Return the mean seconds of a step when several follow each other; on a GPU they queue up, as in training."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device != 'cpu':
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) / steps


def peak_memory(which, recommended, batch, dtype, device):
    """Make three steps, and print the peak memory of this process in MB."""
    step, *_ = stepper(which, recommended, batch, dtype, device, False)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def process_peak(which, batch, args):
    """Return the peak memory in MB of a new process that makes three steps."""
    options = ['--config', args.config, '--peak', which, batch, '--dtype', args.dtype, '--device', args.device]
    process = subprocess.run(command('bench/training.py', *options), check=True, stdout=subprocess.PIPE, text=True)
    return float(process.stdout)


def profile(step):
    """Print the time of each kernel of a step on a GPU."""
    with torch.profiler.profile() as profiler:
        seconds_of(step, 5, 'cuda')
    print(profiler.key_averages().table(sort_by='self_cuda_time_total', row_limit=25, max_name_column_width=80))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--batch', type=int, nargs='*', help='batch sizes (1 4, on a GPU 8 32 128)')
    parser.add_argument('--models', nargs='*', default=NAMES, choices=NAMES)
    parser.add_argument('--config', default=str(ROOT / 'config' / 'landscape.py'),
                        help='of the recommended model (config/landscape.py)')
    parser.add_argument('--dtype', default='auto')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--compile', choices=('yes', 'no', 'both'), help='(both on a GPU, else no)')
    parser.add_argument('--steps', type=int, default=12, help='timings of each model, of which the median counts')
    parser.add_argument('--profile', action='store_true')
    parser.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    device = extras.pick_device(args.device)
    dtype = extras.pick_dtype(args.dtype, device)
    if args.peak:
        return peak_memory(args.peak[0], args.config, int(args.peak[1]), dtype, device)
    cuda = device.startswith('cuda')
    hardware = device_name(device)
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if hardware.startswith(name)), None)
    batches = args.batch or ([8, 32, 128] if cuda else [1, 4])
    choices = {'yes': (True,), 'no': (False,), 'both': (True, False)}[args.compile or ('both' if cuda else 'no')]
    print(f'{device}, {hardware}, torch {torch.__version__}, {str(dtype).removeprefix("torch.")}\n')
    print(table_head(*COLUMNS))
    peaks = {}
    if not cuda:  # before anything else: a child process inherits the peak of its parent
        peaks = {(which, batch): process_peak(which, batch, args) for batch in batches for which in args.models}
    for batch in batches:
        for compiled in choices:
            steppers = [stepper(which, args.config, batch, dtype, device, compiled) for which in args.models]
            for which, (step, *_) in zip(args.models, steppers):
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                seconds_of(step, 3, device)  # the first ones are slow
                if cuda:
                    peaks[which, batch] = torch.cuda.max_memory_allocated() / 1e6
            if args.profile:
                profile(steppers[-1][0])
            seconds = [[seconds_of(step, 10 if cuda else 1, device) for step, *_ in steppers]
                       for _ in range(args.steps)]
            for which, (_, parameters, flops), timings in zip(args.models, steppers, zip(*seconds)):
                median = statistics.median(timings)
                utilisation = f'{flops / median / peak_flops:.1%}' if peak_flops else ''
                cells = [which, f'{parameters / 1e6:.2f}M', batch, 'yes' if compiled else 'no',
                         f'{median * 1e3:.1f}', f'{median / batch * 1e3:.3g}',
                         f'{batch / median:,.3g}', f'{4096 * batch / median:,.0f}',
                         f'{peaks[which, batch]:,.0f}', f'{flops / median / 1e12:.3g}', utilisation]
                print(table_row(*cells), flush=True)
            del steppers, step


if __name__ == '__main__':
    extras.run(main)

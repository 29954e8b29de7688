"""A training step of the recommended model beside one of nanoGPT's: time and memory, at the same shape.

    python bench/training.py                         # 64x64, batches of 1 and 4; on a GPU 8, 32 and 128, compiled and not
    python bench/training.py --dtype float32
    python bench/training.py --batch 32 --profile    # on a GPU: where the time of a step goes
    python bench/training.py --config config/landscape_gpu.py --batch 32 --compile yes

nanoGPT's is model.py with every switch off and its loss the usual way, logits and all, nothing computed twice, with AdamW. Both make steps on random pixels, in turn, and the median
counts; the peak is the memory of a process that has made a few steps of one model (on a GPU, the GPU's). All switches and
the recommended optimizers are those of config/landscape.py, or of --config. The model FLOPs are those of all products of a step, forward and
backward, as torch counts them (attention as if nothing were masked); utilisation is their share of the 989 TFLOP/s that an H100
or H200 makes of bfloat16 at most. Leave the machine idle.
"""
import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402
import model as model_module  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import TrainConfig  # noqa: E402


KEEP, RECOMPUTE = (lambda function, x: function(x)), model_module.checkpointed
NAMES = 'nanoGPT', 'recommended'
PEAK_FLOPS = {'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}  # bfloat16, dense, by the datasheet


def stepper(which, recommended, batch, dtype, device, compiled):
    """-> (a function that makes a training step, the number of parameters, FLOPs of a step)."""
    config = extras.load_config(TrainConfig, [recommended if which == 'recommended' else str(ROOT / 'config' / 'seed.py')])
    autocast = torch.autocast(device.split(':')[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    model = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)},
                          block_size=4096 - (not config.start_embedding))).to(device)
    optimizers = model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2), config.muon_lr)

    def nanogpts_loss(tokens):
        logits = model.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.size(1):].flatten())

    loss_of = model if which == 'recommended' else nanogpts_loss
    with FlopCounterMode(display=False) as counter:
        model_module.checkpointed = KEEP
        loss_of(torch.randint(4096, (1, 4096), device=device)).backward()
        model.zero_grad()
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step():
        model_module.checkpointed = RECOMPUTE if which == 'recommended' else KEEP  # nanoGPT keeps all that it computes
        tokens = torch.randint(4096, (batch, 4096), device=device)
        with autocast:
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step, sum(p.numel() for p in model.parameters()), batch * counter.get_total_flops()


def seconds_of(step, steps, device):
    """Seconds a step of so many one after the other; on a GPU they queue up, as in training."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device != 'cpu':
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) / steps


def peak_memory(which, recommended, batch, dtype, device):
    """Print the peak in MB of a process that makes three steps."""
    step, *_ = stepper(which, recommended, batch, dtype, device, False)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def profile(step):
    """Where the time of a step goes on a GPU, kernel by kernel."""
    with torch.profiler.profile() as profiler:
        seconds_of(step, 5, 'cuda')
    print(profiler.key_averages().table(sort_by='self_cuda_time_total', row_limit=25, max_name_column_width=80))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='*', help='batch sizes (1 4, on a GPU 8 32 128)')
    parser.add_argument('--models', nargs='*', default=NAMES, choices=NAMES)
    parser.add_argument('--config', default=str(ROOT / 'config' / 'landscape.py'), help='of the recommended model (config/landscape.py)')
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
    torch.set_float32_matmul_precision('high')  # as in train.py
    cuda = device.startswith('cuda')
    card = torch.cuda.get_device_name(device) if cuda else f'{torch.get_num_threads()} threads'
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if card.startswith(name)), None)
    batches = args.batch or ([8, 32, 128] if cuda else [1, 4])
    print(f'{device}, {card}, torch {torch.__version__}, {str(dtype).removeprefix("torch.")}\n')
    print('| model | parameters | batch | compiled | ms a step | ms an image | images/s | tokens/s | peak MB | TFLOP/s | utilisation |\n|---|---|---|---|---|---|---|---|---|---|---|')
    # first of all: a child process inherits the peak of its parent
    peaks = {} if cuda else {(which, batch): float(subprocess.run([sys.executable, __file__, '--config', args.config, '--peak', which, str(batch), '--dtype', args.dtype, '--device', args.device],
                                                                  check=True, stdout=subprocess.PIPE, text=True).stdout) for batch in batches for which in args.models}
    for batch in batches:
        for compiled in {'yes': (True,), 'no': (False,), 'both': (True, False)}[args.compile or ('both' if cuda else 'no')]:
            steppers = [stepper(which, args.config, batch, dtype, device, compiled) for which in args.models]
            for which, (step, *_) in zip(args.models, steppers):
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                seconds_of(step, 3, device)  # the first ones are slow
                if cuda:
                    peaks[which, batch] = torch.cuda.max_memory_allocated() / 1e6
            if args.profile:
                profile(steppers[-1][0])
            seconds = [[seconds_of(step, 10 if cuda else 1, device) for step, *_ in steppers] for _ in range(args.steps)]
            for which, (_, parameters, flops), mine in zip(args.models, steppers, zip(*seconds)):
                took = statistics.median(mine)
                share = f'{flops / took / peak_flops:.1%}' if peak_flops else ''
                print(f'| {which} | {parameters / 1e6:.2f}M | {batch} | {"yes" if compiled else "no"} | {took * 1e3:.1f} | {took / batch * 1e3:.3g} | {batch / took:,.3g} | {4096 * batch / took:,.0f} | '
                      f'{peaks[which, batch]:,.0f} | {flops / took / 1e12:.3g} | {share} |', flush=True)
            del steppers, step


if __name__ == '__main__':
    extras.run(main)

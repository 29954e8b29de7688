"""A training step of the recommended model beside one of nanoGPT's: time and memory, at the same shape.

    python bench/training.py                         # 64x64, batches of 1 and 4
    python bench/training.py --dtype float32

nanoGPT's is model.py with every switch off and its loss the usual way, logits and all, nothing computed twice, with AdamW. Both make steps on random pixels, in turn, and the median
counts; the peak is the memory of a process that has made a few steps of one model (on a GPU, the GPU's). All switches and
the recommended optimizers are those of config/landscape.py. Leave the machine idle.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402
import model as model_module  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import TrainConfig  # noqa: E402


KEEP, RECOMPUTE = (lambda function, x: function(x)), model_module.recomputed


def stepper(which, batch, dtype, device):
    """-> (a function that makes a training step and returns its seconds, the number of parameters)."""
    config = extras.load_config(TrainConfig, [str(ROOT / 'config' / ('landscape.py' if which == 'recommended' else 'seed.py'))])
    autocast = torch.autocast(device.split(':')[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    model = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)},
                          block_size=4096 - (not config.start_embedding))).to(device)
    optimizers = model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2), config.muon_lr)

    def step():
        model_module.recomputed = RECOMPUTE if which == 'recommended' else KEEP  # nanoGPT keeps all that it computes
        tokens = torch.randint(4096, (batch, 4096), device=device)
        began = time.perf_counter()
        with autocast:
            if which == 'recommended':
                loss = model(tokens)
            else:
                logits = model.logits(tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.size(1):].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if device != 'cpu':
            torch.accelerator.synchronize()
        return time.perf_counter() - began
    return step, sum(p.numel() for p in model.parameters())


def peak_memory(which, batch, dtype, device):
    """Print the peak in MB of a process that makes three steps."""
    step, _ = stepper(which, batch, dtype, device)
    for _ in range(3):
        step()
    print(torch.cuda.max_memory_allocated() / 1e6 if device.startswith('cuda') else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='*', default=[1, 4])
    parser.add_argument('--dtype', default='auto')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    device = extras.pick_device(args.device)
    dtype = extras.pick_dtype(args.dtype, device)
    if args.peak:
        return peak_memory(args.peak[0], int(args.peak[1]), dtype, device)
    print('| model | parameters | batch | precision | s an image | images/s | tokens/s | peak MB |\n|---|---|---|---|---|---|---|---|')
    names = 'nanoGPT', 'recommended'
    # first of all: a child process inherits the peak of its parent
    peaks = {(which, batch): float(subprocess.run([sys.executable, __file__, '--peak', which, str(batch), '--dtype', args.dtype, '--device', args.device],
                                                  check=True, stdout=subprocess.PIPE, text=True).stdout) for batch in args.batch for which in names}
    for batch in args.batch:
        steppers = [stepper(which, batch, dtype, device) for which in names]
        seconds = [[step() for step, _ in steppers] for _ in range(args.steps + 2)][2:]  # the first two are slow
        for which, (_, parameters), mine in zip(names, steppers, zip(*seconds)):
            each = statistics.median(mine) / batch
            print(f'| {which} | {parameters / 1e6:.2f}M | {batch} | {str(dtype).removeprefix("torch.")} | {each:.3f} | {1 / each:.2f} | {4096 / each:,.0f} | {peaks[which, batch]:,.0f} |', flush=True)


if __name__ == '__main__':
    extras.run(main)

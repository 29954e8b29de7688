"""A training step of the recommended model beside one of nanoGPT's: time and memory, at the same shape.

    python bench/training.py                         # 64x64, batches of 1 and 4
    python bench/training.py --dtype float32

nanoGPT's is model.py with every switch off and its loss the usual way, logits and all, nothing computed twice, with AdamW. Each measurement is a process of
its own, which makes steps on random pixels and takes the fastest; the peak is that of its memory (on a GPU, of the GPU's). All switches and
the recommended optimizers are those of config/landscape.py. Leave the machine idle.
"""
import argparse
import contextlib
import resource
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


def measure(which, batch, dtype, device, steps):
    """Print seconds a step and the peak in MB."""
    config = extras.load_config(TrainConfig, [str(ROOT / 'config' / ('landscape.py' if which == 'recommended' else 'seed.py'))])
    device = extras.pick_device(device)
    dtype = extras.pick_dtype(dtype, device)
    if which == 'nanoGPT':
        model_module.recomputed = lambda function, x: function(x)  # nanoGPT keeps all that it computes
    autocast = torch.autocast(device.split(':')[0], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    model = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)},
                          block_size=4096 - (not config.start_embedding))).to(device)
    optimizers = model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2), config.muon_lr)
    seconds = []
    for _ in range(steps):
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
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.startswith('cuda') else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(min(seconds), peak, sum(p.numel() for p in model.parameters()), str(dtype).removeprefix('torch.'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, nargs='*', default=[1, 4])
    parser.add_argument('--dtype', default='auto')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    if args.one:
        return measure(args.one[0], int(args.one[1]), args.dtype, args.device, args.steps)
    print('| model | parameters | batch | precision | s an image | images/s | tokens/s | peak MB |\n|---|---|---|---|---|---|---|---|')
    for batch in args.batch:
        for which in ('nanoGPT', 'recommended'):
            done = subprocess.run([sys.executable, __file__, '--one', which, str(batch), '--dtype', args.dtype, '--device', args.device, '--steps', str(args.steps)],
                                  check=True, stdout=subprocess.PIPE, text=True)
            seconds, peak, parameters, dtype = done.stdout.split()
            each = float(seconds) / batch
            print(f'| {which} | {int(parameters) / 1e6:.2f}M | {batch} | {dtype} | {each:.3f} | {1 / each:.2f} | {4096 / each:,.0f} | {float(peak):,.0f} |', flush=True)


if __name__ == '__main__':
    main()

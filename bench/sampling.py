"""How fast the sampler paints, beside the plain loop and beside what the memory allows.

    python bench/sampling.py                              # the shipped checkpoint
    python bench/sampling.py --ckpt out/mine/ckpt6000.pt  # another one
    python bench/sampling.py --profile                    # where the time of a wave goes
    python bench/sampling.py --check 8                    # eight images pixel by pixel the plain way: a minute a setting on a GPU

The plain loop runs the whole image so far through the whole model for every pixel. It is timed at ten lengths, a parabola is laid
through them and summed over all lengths. The limit is what reading takes: all weights once a wave, and the keys and values that
its pixels look at, at the speed at which this machine sums up as many bytes that it has just read before. One image is the mean
of ten, with their spread. All in one run; leave the machine idle.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402
import sample  # noqa: E402


def clock(device):
    """Seconds, when all that has been asked of the device is done."""
    if device != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter()


def best_of(times, function, device):
    seconds = []
    for _ in range(times):
        began = clock(device)
        function()
        seconds.append(clock(device) - began)
    return min(seconds)


def one_pixel(model, images):
    x, weight = model.features(images)
    return x[:, -1] @ weight.t()


@torch.inference_mode()
def plain_loop(model, batch, device):
    """Seconds that the plain loop takes for a batch, from its time at ten lengths."""
    N = model.config.tokens_per_image
    lengths = np.unique(np.linspace(2, N, 10).astype(int))
    seconds = []
    for length in lengths:
        images = torch.randint(4096, (batch, length), device=device)
        seconds.append(best_of(3 if batch < 8 else 2, lambda: one_pixel(model, images), device))
    parabola = np.polyfit(lengths, seconds, 2, w=1 / np.array(seconds))
    return np.polyval(parabola, np.arange(1, N + 1)).clip(min(seconds)).sum()


def painted(model, batch, device, seed):
    """-> seconds that painting a batch takes."""
    prompt = torch.full((batch, int(not model.config.start_embedding)), 0xFEC, device=device)
    began = clock(device)
    model.generate(prompt, generator=torch.Generator().manual_seed(seed))
    return clock(device) - began


@torch.inference_mode()
def limit(model, batch, device):
    """-> (waves of an image, seconds that reading takes for so many images side by side, bandwidth in bytes/s)."""
    decoder = sample.Decoder(model, torch.zeros(1, model.config.tokens_per_image, dtype=torch.long, device=device), 0)
    waves, weights = len(decoder.waves(0)), model.num_params()
    cache = batch * model.config.n_embd * sum(kv.size(3) for kv in decoder.cache)  # a pixel: on average, half of the keys and values of a lane stand already
    buffer = torch.ones(weights + cache, dtype=model.lm_head.weight.dtype, device=device)
    buffer.sum()
    bandwidth = buffer.numel() * buffer.element_size() / best_of(20, buffer.sum, device)
    return waves, (waves * weights + model.config.tokens_per_image * cache) * buffer.element_size() / bandwidth, bandwidth


def first_picture(ckpt):
    """Seconds from pressing enter to one finished picture of sample.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / 'sample.py'), '--ckpt', ckpt, '--num_samples', '1', '--first_pixel', 'FEC', '--out', f'{folder}/a.png']
        return best_of(3, lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 'cpu')


def profile(model, device):
    """What a wave in the middle of an image is made of."""
    image, seeds = torch.zeros(1, model.config.tokens_per_image, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
    draw = lambda logits, noise: sample.sample(sample.filter_logits(logits), noise)
    with sample.inference_settings(model):
        waves = sample.wave_loop(model, image, seeds, draw, int(not model.config.start_embedding))
        for _ in range(150):
            next(waves)
        with torch.profiler.profile() as profiler:
            for _ in range(200):
                next(waves)
    print('| operation | calls a wave | us a wave |\n|---|---|---|')
    for e in sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total):
        if e.count >= 200 and e.self_cpu_time_total > 1000:
            print(f'| {e.key.removeprefix("aten::")} | {e.count / 200:.0f} | {e.self_cpu_time_total / 200:.0f} |')


def check(model, count, device):
    """Whole images by the plain loop beside the sampler's, side by side and the first one alone: how many pixels differ."""
    N, starts = model.config.tokens_per_image, int(not model.config.start_embedding)
    real = model.generate(torch.full((count, starts), 0xFEC), generator=torch.Generator().manual_seed(1))
    print('| options | given pixels | drawn | differ | of the first one alone |\n|---|---|---|---|---|')
    for given, options in ((1, {}), (starts, dict(top_k=50, temperature=0.9)), (N // 2 + 17, dict(top_p=0.95)), (3 * N // 4 + 5, dict(temperature=0))):
        paint = lambda prompts, **more: model.generate(prompts, generator=torch.Generator().manual_seed(5), **options, **more)
        plain, waves, alone = paint(real[:, :given], use_cache=False), paint(real[:, :given]), paint(real[:1, :given])
        print(f'| {options} | {given} | {count * (N - given)} | {(plain != waves).sum()} | {(plain[:1] != alone).sum()} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', default=str(ROOT / 'out' / 'ckpt6000.pt'))
    parser.add_argument('--batch', type=int, nargs='*', help='batch sizes (1 8 32, on a GPU 1 32 256 1024)')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--eager', action='store_true', help='on a GPU: wave by wave, without graphs')
    parser.add_argument('--check', type=int, metavar='N', help='paint N images the plain way, too, and compare, instead')
    parser.add_argument('--profile', action='store_true', help='take one wave apart instead')
    args = parser.parse_args()
    device = extras.pick_device(args.device)
    model = extras.build_model(extras.load_checkpoint(args.ckpt, device), args.ckpt, device)
    if args.eager:
        sample.graph_loop = sample.wave_loop
    if args.profile:
        return profile(model, device)
    if args.check:
        return check(model, args.check, device)
    start_up = first_picture(args.ckpt) if device == 'cpu' else None
    cores = f'{torch.get_num_threads()} threads' if device == 'cpu' else torch.cuda.get_device_name(device)
    print(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {model.config.tokens_per_image} pixels, {device}, {cores}, torch {torch.__version__}\n')
    print('| batch | s an image | spread | pixels/s | plain loop, s an image | times faster | waves | us a wave | limit, s an image | share of it | GB/s |')
    print('|---|---|---|---|---|---|---|---|---|---|---|')
    model.generate(torch.full((1, 1), 0xFEC), 40)  # libraries set themselves up
    for batch in tqdm(args.batch or ([1, 8, 32] if device == 'cpu' else [1, 32, 256, 1024]), leave=False):
        all_seconds = [painted(model, batch, device, seed) for seed in range(10 if batch == 1 else 2)]
        seconds, spread = np.mean(all_seconds), (max(all_seconds) - min(all_seconds)) / np.mean(all_seconds)
        together = min(batch, sample.images_at_once(model))
        plain = plain_loop(model, together, device) * batch / together
        waves, least, bandwidth = limit(model, together, device)
        least *= batch / together
        tqdm.write(f'| {batch} | {seconds / batch:.3g} | {spread:.0%} | {batch * model.config.tokens_per_image / seconds:,.0f} | {plain / batch:.3g} | {plain / seconds:.0f} | '
                   f'{waves} | {seconds / waves / batch * together * 1e6:.0f} | {least / batch:.2g} | {least / seconds:.0%} | {bandwidth / 1e9:.0f} |', file=sys.stdout)
        if batch == 1 and start_up:
            tqdm.write(f'\nsample.py writes its first picture {start_up:.1f} s after enter, {start_up - seconds:.1f} s of them start-up; '
                       f'with that, the plain loop takes {(plain + start_up - seconds) / start_up:.0f} times as long.\n', file=sys.stdout)


if __name__ == '__main__':
    extras.run(main)

"""How fast the sampler paints, beside the plain loop and beside what the memory allows.

    python bench/sampling.py                          # the shipped checkpoint
    python bench/sampling.py --ckpt out/mine/ckpt6000.pt  # another trained one: an untrained model is no measure, its pixels are too easily guessed
    python bench/sampling.py --windows                # one image, so many pixels a pass
    python bench/sampling.py --profile                # where the time of a pass goes

The plain loop runs the whole image so far through the whole model for every pixel. It is timed at ten lengths, a parabola is laid
through them and summed over all lengths. The limit is what reading takes: all weights and the keys and values so far, once a
pass, at the speed at which this machine sums up as many bytes that it has just read before. One image is the mean of four, of which some are
guessed better than others. All in one run; leave the machine idle.
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
import model as model_module  # noqa: E402
from model import AHEAD, Decoder, choose, images_at_once, paint_ahead, painting, restrict  # noqa: E402


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


def cached(model, batch, device, seed):
    """-> seconds for a batch, pixels of an image a pass, and seconds a pixel of each image at the start and at the end of the image."""
    marks, N = [], model.config.tokens_per_image
    prompt = torch.full((batch, int(not model.config.start_embedding)), 0xFEC, device=device)
    began = clock(device)
    model.generate(prompt, generator=torch.Generator().manual_seed(seed), progress=lambda pixels: marks.append((pixels / batch, clock(device))))
    seconds = clock(device) - began
    pixels, times = np.cumsum([m[0] for m in marks]), np.array([m[1] for m in marks])
    at = np.interp([N / 64, N / 16, N * 15 / 16, N], pixels, times)
    return seconds, N / len(marks) if batch == 1 else 1, (at[1] - at[0]) / (N * 3 / 64), (at[3] - at[2]) / (N / 16)


@torch.inference_mode()
def limit(model, batch, device):
    """Seconds that reading the weights and the caches takes, once for every pixel of a batch as it is painted, and the bandwidth in bytes/s."""
    batch = min(batch, images_at_once(model))
    weights = model.num_params()
    lanes = Decoder(model, 1).lanes  # on average, half of the positions of a lane stand already
    cache = batch * sum(model.config.n_embd * lanes[block.attn.kind][1] for block in model.transformer.h)
    buffer = torch.ones(int(weights + cache), dtype=model.lm_head.weight.dtype, device=device)
    buffer.sum()
    bandwidth = buffer.numel() * buffer.element_size() / best_of(20, buffer.sum, device)
    return (weights + cache) * buffer.element_size() * model.config.tokens_per_image / bandwidth, bandwidth


def first_picture(ckpt):
    """Seconds from pressing enter to one finished picture of sample.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / 'sample.py'), '--ckpt', ckpt, '--num_samples', '1', '--first_pixel', 'FEC', '--out', f'{folder}/a.png']
        return best_of(2, lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 'cpu')


def profile(model, device):
    """What a pass of AHEAD pixels in the middle of an image is made of."""
    width, tokens = model.config.width, torch.zeros(1, AHEAD, dtype=torch.long, device=device)
    with painting(model, 1):
        decoder = Decoder(model, 1, AHEAD)
        step = lambda i: choose(restrict(decoder.decode(tokens, width * (width // 2) + i % (width - AHEAD))[0]), 0.0)
        for i in range(100):
            step(i)
        with torch.profiler.profile() as profiler:
            for i in range(200):
                step(i)
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    print('| operation | calls a pass | us a pass |\n|---|---|---|')
    for e in events:
        if e.count >= 200 and e.self_cpu_time_total > 1000:
            print(f'| {e.key.removeprefix("aten::")} | {e.count / 200:.0f} | {e.self_cpu_time_total / 200:.0f} |')


def windows(model):
    """One image with so many pixels a pass; it must be the same image every time."""
    print('| pixels a pass, at most | on average | us a pass | s an image |\n|---|---|---|---|')
    images, N = {}, model.config.tokens_per_image
    for window in (1, 2, 4, 6, 8, 12):
        passes = seconds = 0
        for seed in range(4):
            image = torch.full((1, N), 0xFEC)
            with painting(model, 1):
                began = time.perf_counter()
                passes += sum(1 for _ in paint_ahead(model, image, torch.tensor([seed]), lambda logits, noise: choose(restrict(logits), noise), 1, window))
                seconds += time.perf_counter() - began
            assert images.setdefault(seed, image).equal(image)
        print(f'| {window} | {4 * (N - 1) / passes:.2f} | {seconds / passes * 1e6:.0f} | {seconds / 4:.2f} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', default=str(ROOT / 'out' / 'ckpt6000.pt'))
    parser.add_argument('--batch', type=int, nargs='*', help='batch sizes (1 8 32, on a GPU 1 32 256 1024)')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--eager', action='store_true', help='on a GPU: step by step, without graphs')
    parser.add_argument('--profile', action='store_true', help='take one pass apart instead')
    parser.add_argument('--windows', action='store_true', help='on a CPU: one image with so many pixels a pass, instead')
    args = parser.parse_args()
    device = extras.pick_device(args.device)
    model = extras.build_model(extras.load_checkpoint(args.ckpt, device), args.ckpt, device)
    if args.eager:
        model_module.paint_on_cuda = model_module.paint_cached
    if args.profile or args.windows:
        return profile(model, device) if args.profile else windows(model)
    start_up = first_picture(args.ckpt) if device == 'cpu' else None
    cores = f'{torch.get_num_threads()} threads' if device == 'cpu' else torch.cuda.get_device_name(device)
    print(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {model.config.tokens_per_image} pixels, {device}, {cores}, torch {torch.__version__}\n')
    print('| batch | s an image | pixels/s | plain loop, s an image | times faster | pixels a pass | us a pixel, at the start | at the end | limit, s an image | share of it | GB/s |')
    print('|---|---|---|---|---|---|---|---|---|---|---|')
    model.generate(torch.full((1, 1), 0xFEC), 40)  # libraries set themselves up
    for batch in tqdm(args.batch or ([1, 8, 32] if device == 'cpu' else [1, 32, 256, 1024]), leave=False):
        seconds, ahead, start, end = np.mean([cached(model, batch, device, seed) for seed in range(4 if batch == 1 else 1)], axis=0)
        together = min(batch, images_at_once(model))
        plain = plain_loop(model, together, device) * batch / together
        least, bandwidth = limit(model, batch, device)
        least *= batch / together / ahead
        ends = f'{start / batch * 1e6:.0f} | {end / batch * 1e6:.0f}' if batch == together else '- | -'
        tqdm.write(f'| {batch} | {seconds / batch:.3g} | {batch * model.config.tokens_per_image / seconds:,.0f} | {plain / batch:.3g} | {plain / seconds:.0f} | {ahead:.2f} | {ends} | '
                   f'{least / batch:.2g} | {least / seconds:.0%} | {bandwidth / 1e9:.0f} |', file=sys.stdout)
        if batch == 1 and start_up:
            tqdm.write(f'\nsample.py writes its first picture {start_up:.1f} s after enter, {start_up - seconds:.1f} s of them start-up; with that, the plain loop takes {(plain + start_up - seconds) / start_up:.0f} times as long.', file=sys.stdout)


if __name__ == '__main__':
    extras.run(main)

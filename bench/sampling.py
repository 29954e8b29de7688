"""Measure how fast the sampler paints, beside the plain loop and beside what the memory allows.

    python bench/sampling.py                              # the shipped checkpoint
    python bench/sampling.py --ckpt out/mine/ckpt6000.pt  # another one
    python bench/sampling.py --profile                    # where the time of a wave goes
    python bench/sampling.py --check 8                    # compare eight images: a minute a setting on a GPU

The plain loop runs the whole image so far through the whole model for every pixel. It is timed at ten lengths; a
parabola is fitted to the times and summed over all lengths. The limit is the time of the memory reads: all weights
once a wave, and the keys and values that its pixels attend to, at the bandwidth with which this machine sums up as
many bytes that it has just read before. One image is the mean of ten, with their spread. All is measured in one run;
leave the machine idle.
"""
import sys
import tempfile
import time

import numpy as np
import torch
from tqdm import tqdm

from common import ROOT, argument_parser, device_name, run_script, table_head, table_row
import extras
from model import head_logits
import sample

COLUMNS = ('batch', 's an image', 'spread', 'pixels/s', 'plain loop, s an image', 'times faster', 'waves', 'us a wave',
           'limit, s an image', 'share of it', 'GB/s')


def clock(device):
    """Wait for the device to finish its work. Return the time in seconds."""
    if device != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter()


def best_of(times, function, device):
    """Call a function several times. Return the seconds of the fastest call."""
    seconds = []
    for _ in range(times):
        began = clock(device)
        function()
        seconds.append(clock(device) - began)
    return min(seconds)


def one_pixel(model, images):
    """Return the logits of the next pixel from all earlier ones, without a cache."""
    return head_logits(model.features(images)[:, -1], model.lm_head.weight)


@torch.inference_mode()
def plain_loop(model, batch, device):
    """Return the seconds that the plain loop takes for a batch, from a parabola through ten lengths."""
    N = model.config.tokens_per_image
    lengths = np.unique(np.linspace(2, N, 10).astype(int))
    seconds = []
    for length in lengths:
        images = torch.randint(4096, (batch, length), device=device)
        seconds.append(best_of(3 if batch < 8 else 2, lambda: one_pixel(model, images), device))
    parabola = np.polyfit(lengths, seconds, 2, w=1 / np.array(seconds))
    return np.polyval(parabola, np.arange(1, N + 1)).clip(min(seconds)).sum()


def sampling_seconds(model, batch, device, seed):
    """Return the seconds that the sampler takes for a batch."""
    prompt = torch.full((batch, int(not model.config.start_embedding)), 0xFEC, device=device)
    began = clock(device)
    model.generate(prompt, generator=torch.Generator().manual_seed(seed))
    return clock(device) - began


@torch.inference_mode()
def memory_limit(model, batch, device):
    """Return the waves of an image, the least seconds for the reads of a batch, and the bandwidth in bytes/s."""
    N = model.config.tokens_per_image
    decoder = sample.Decoder(model, torch.zeros(1, N, dtype=torch.long, device=device), 0)
    waves, weights = len(decoder.waves(0)), model.num_params()
    # for each pixel: on average, half of the keys and values of a lane are in the cache
    cache = batch * model.config.n_embd * sum(kv.size(3) for kv in decoder.cache)
    buffer = torch.ones(weights + cache, dtype=model.lm_head.weight.dtype, device=device)
    buffer.sum()
    bandwidth = buffer.numel() * buffer.element_size() / best_of(20, buffer.sum, device)
    seconds = (waves * weights + N * cache) * buffer.element_size() / bandwidth
    return waves, seconds, bandwidth


def first_picture(ckpt):
    """Return the seconds from the start of sample.py to its first finished picture."""
    with tempfile.TemporaryDirectory() as folder:
        options = ['--ckpt', ckpt, '--num_samples', 1, '--first_pixel', 'FEC', '--out', f'{folder}/a.png']
        return best_of(3, lambda: run_script('sample.py', *options, quiet=True), 'cpu')


def profile(model, device):
    """Print the operations of a wave in the middle of an image, and their times."""
    image = torch.zeros(1, model.config.tokens_per_image, dtype=torch.long, device=device)
    seeds = torch.zeros(1, dtype=torch.long, device=device)
    draw = lambda logits, noise: sample.sample(sample.filter_logits(logits), noise)
    with sample.inference_settings(model):
        waves = sample.wave_loop(model, image, seeds, draw, int(not model.config.start_embedding))
        for _ in range(150):
            next(waves)
        with torch.profiler.profile() as profiler:
            for _ in range(200):
                next(waves)
    print(table_head('operation', 'calls a wave', 'us a wave'))
    for e in sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total):
        if e.count >= 200 and e.self_cpu_time_total > 1000:
            name = e.key.removeprefix('aten::')
            print(table_row(name, f'{e.count / 200:.0f}', f'{e.self_cpu_time_total / 200:.0f}'))


def check(model, count, device):
    """Print in how many pixels the sampler's images differ from the plain loop's, together and the first one alone."""
    N, starts = model.config.tokens_per_image, int(not model.config.start_embedding)
    real = model.generate(torch.full((count, starts), 0xFEC), generator=torch.Generator().manual_seed(1))
    settings = [
        (1, dict()),
        (starts, dict(top_k=50, temperature=0.9)),
        (N // 2 + 17, dict(top_p=0.95)),
        (3 * N // 4 + 5, dict(temperature=0)),
    ]
    print(table_head('options', 'given pixels', 'drawn', 'differ', 'of the first one alone'))
    for given, options in settings:
        def generate(prompts, **more):
            return model.generate(prompts, generator=torch.Generator().manual_seed(5), **options, **more)

        plain = generate(real[:, :given], use_cache=False)
        waves, alone = generate(real[:, :given]), generate(real[:1, :given])
        differ, differ_alone = (plain != waves).sum().item(), (plain[:1] != alone).sum().item()
        print(table_row(options, given, count * (N - given), differ, differ_alone), flush=True)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--ckpt', default=str(ROOT / 'out' / 'ckpt6000.pt'))
    parser.add_argument('--batch', type=int, nargs='*', help='batch sizes (1 8 32, on a GPU 1 32 256 1000)')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--eager', action='store_true', help='on a GPU: wave by wave, without graphs')
    parser.add_argument('--check', type=int, metavar='N',
                        help='paint N images the plain way, too, and compare, instead')
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
    first = first_picture(args.ckpt) if device == 'cpu' else None
    N = model.config.tokens_per_image
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'{parameters:.2f}M parameters, {N} pixels, {device}, {device_name(device)}, torch {torch.__version__}\n')
    print(table_head(*COLUMNS))
    model.generate(torch.full((1, 1), 0xFEC), 40)  # warm-up of the libraries
    for batch in tqdm(args.batch or ([1, 8, 32] if device == 'cpu' else [1, 32, 256, 1000]), leave=False):
        all_seconds = [sampling_seconds(model, batch, device, seed) for seed in range(10 if batch == 1 else 2)]
        seconds, spread = np.mean(all_seconds), (max(all_seconds) - min(all_seconds)) / np.mean(all_seconds)
        together = min(batch, sample.images_at_once(model))
        plain = plain_loop(model, together, device) * batch / together
        waves, least, bandwidth = memory_limit(model, together, device)
        least *= batch / together
        cells = [batch, f'{seconds / batch:.3g}', f'{spread:.0%}', f'{batch * N / seconds:,.0f}',
                 f'{plain / batch:.3g}', f'{plain / seconds:.0f}',
                 waves, f'{seconds / waves / batch * together * 1e6:.0f}',
                 f'{least / batch:.2g}', f'{least / seconds:.0%}', f'{bandwidth / 1e9:.0f}']
        tqdm.write(table_row(*cells), file=sys.stdout)
        if batch == 1 and first:
            start_up = first - seconds
            times = (plain + start_up) / first
            tqdm.write(f'\nsample.py writes its first picture {first:.1f} s after enter, {start_up:.1f} s of them '
                       f'start-up; with that, the plain loop takes {times:.0f} times as long.\n', file=sys.stdout)


if __name__ == '__main__':
    extras.run(main)

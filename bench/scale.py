"""Train and sample at three sizes: what does a pixel cost, in pictures of 32x32, 64x64 and 128x128?

    python bench/scale.py                                  # a table, and out/scale/scale.png
    python bench/scale.py --models recommended             # eight minutes on two cores

Both models learn from two million pixels of synthetic landscapes, 16,384 an iteration at any size, with the settings
of config/landscape.py, and nanoGPT's model with the best ones known for small batches. Memory is that of the whole
process of train.py. Then all of them make training steps (those of bench/training.py) in turn, since the speed of a
machine changes within minutes, and the median counts. One picture is painted by sample.py's sampler with its cache, for
nanoGPT's model too. Leave the machine idle.
"""
import os
import statistics
import subprocess

import torch

from common import ROOT, argument_parser, command, device_name, read_log, run_script, table_head, table_row
import extras
from sampling import sampling_seconds
from training import seconds_of, stepper

PIXELS_AN_ITERATION, ITERATIONS, ROUNDS = 2 ** 14, 128, 9
VALIDATION = 4  # as many training images for each validation image
NANOGPT = ['config/seed.py', '--start_embedding=True', '--flip=True', '--gradient_accumulation_steps=1',
           '--learning_rate=2e-3', '--min_lr=1e-5', '--beta2=0.99', '--warmup_iters=32']
OPTIONS = {'nanoGPT': NANOGPT, 'recommended': ['config/landscape.py', '--warmup_iters=32']}
COLUMNS = ('model', 'size', 'bits per pixel', 'training, s an image', 'us a pixel', 'peak MB', 'sampling, s an image',
           'us a pixel')


def train(options, data, out_dir, size):
    """Train a model. Return its validation loss in bits per pixel, and the peak in MB."""
    fixed = [f'--data_dir={data}', f'--out_dir={out_dir}', f'--batch_size={PIXELS_AN_ITERATION // size ** 2}',
             '--eval_batch_size=4', f'--max_iters={ITERATIONS}', '--eval_at=()', '--num_samples=1', '--overwrite=True']
    process = subprocess.Popen(command('train.py', *options, *fixed), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise extras.UserError(f'training stopped: python train.py {" ".join([*options, *fixed])}')
    last = [row for row in read_log(out_dir) if row['val_loss']][-1]
    return float(last['bits_per_pixel']), usage.ru_maxrss * 1024 / 1e6


def training_seconds(models):
    """Return the seconds that an image takes in training: {(model, size): s}. Their steps are timed in turn."""
    config, dtype = str(ROOT / 'config' / 'landscape.py'), extras.pick_dtype('auto', 'cpu')
    batch = {size: PIXELS_AN_ITERATION // size ** 2 for _, size in models}
    steps = {(name, size): stepper(name, config, batch[size], dtype, 'cpu', False, size)[0] for name, size in models}
    rounds = [{model: seconds_of(step, 1, 'cpu') for model, step in steps.items()} for _ in range(1 + ROUNDS)]
    return {(name, size): statistics.median(seconds[name, size] for seconds in rounds[1:]) / batch[size]  # 0: warm-up
            for name, size in models}


def plot(results, path):
    """Plot microseconds a pixel over the size, for training and sampling. results: {(model, size): (s, s)}."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for i, (ax, title) in enumerate(zip(axes, ('training', 'sampling'))):
        for name in OPTIONS:
            points = [(size, seconds[i] / size ** 2 * 1e6) for (model, size), seconds in results.items()
                      if model == name]
            if points:
                ax.plot(*zip(*points), 'o-', label=name)
        sizes = sorted({size for _, size in results})
        ax.set(xscale='log', yscale='log', title=title, xlabel='size of a picture', ylabel='microseconds a pixel')
        ax.minorticks_off()
        ax.set_xticks(sizes, [f'{size}x{size}' for size in sizes])
        low, high = ax.get_ylim()
        ticks = [digit * 10 ** power for power in range(6) for digit in (1, 2, 5)]
        ax.set_yticks([tick for tick in ticks if low <= tick <= high])
        ax.yaxis.set_major_formatter('{x:g}')
        ax.grid(alpha=0.3, which='both')
        ax.legend()
    with extras.atomic_write(path) as f:
        figure.savefig(f, format='png', dpi=100)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--sizes', type=int, nargs='*', default=[32, 64, 128])
    parser.add_argument('--models', nargs='*', default=list(OPTIONS), choices=OPTIONS)
    args = parser.parse_args()
    trained = {}  # all, before this process grows by sampling: a child process inherits the peak of its parent
    for size in args.sizes:
        data = ROOT / 'data' / f'scale{size}'
        images = PIXELS_AN_ITERATION * ITERATIONS // size ** 2
        run_script('prepare.py', '--source', 'synthetic', '--num_images', images + images // VALIDATION,
                   '--val_fraction', 1 / (VALIDATION + 1), '--size', size, '--out_dir', data, quiet=True)
        for name in args.models:
            out_dir = ROOT / 'out' / 'scale' / f'{name}{size}'
            trained[name, size] = out_dir, *train(OPTIONS[name], data, out_dir, size)

    print(f'{device_name("cpu")}, torch {torch.__version__}\n\n{table_head(*COLUMNS)}')
    training, results = training_seconds(trained), {}
    for (name, size), (out_dir, bits, peak) in trained.items():
        path = str(out_dir / f'ckpt{ITERATIONS}.pt')
        model = extras.build_model(extras.load_checkpoint(path), path, 'cpu')
        model.generate(torch.zeros(1, 0, dtype=torch.long), 100)  # warm-up of the libraries
        sampling = sampling_seconds(model, 1, 'cpu', seed=1)
        results[name, size] = seconds = training[name, size], sampling
        (image, pixel), (painted, painted_pixel) = ((f'{s:.3g}', f'{s / size ** 2 * 1e6:.1f}') for s in seconds)
        print(table_row(name, size, f'{bits:.3f}', image, pixel, f'{peak:,.0f}', painted, painted_pixel), flush=True)
    plot(results, ROOT / 'out' / 'scale' / 'scale.png')


if __name__ == '__main__':
    extras.run(main)

"""What people see, measured without any pretrained network: samples of models beside real photographs.

    python bench/quality.py --ckpt out/ckpt6000.pt --data data/photos                  # 1,000 samples: less than half an hour on two cores
    python bench/quality.py --ckpt frequencies out/ckpt200.pt out/ckpt6000.pt --num_samples 256     # a quick look, side by side
    python bench/quality.py --ckpt out/ckpt6000.pt --sampling temperature=0.9 top_p=0.95 --num_samples 256

Every set is compared with the same validation images, drawn at random. The column "floor" does so with as many training images: what two sets of
real photographs differ by. `frequencies` is a bad model on purpose: pixels that know nothing of each other, as frequent as in the
training images. Real images are tokens too, so that all went through the same quantisation. What a row means stands at its function.
With several checkpoints of one run, out/quality/run.png shows what is seen over iterations and over bits per pixel, and out/quality/training.png
nine samples of each, a row a checkpoint, a column with the same noise; out/quality/pairs.png shows the eight samples (of the last model) that are closest to a
training image, and that image.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402

# -----------------------------------------------------------------------------
# measures of images: tokens (n, H, W), or their levels (n, H, W, 3), 0 .. 15 in float32


def levels(tokens):
    return np.stack((tokens >> 8 & 15, tokens >> 4 & 15, tokens & 15), axis=-1).astype(np.float32)


def luminance(rgb):
    return rgb @ np.float32([0.299, 0.587, 0.114])


def pyramid(rgb, smallest=16):
    """Laplacian pyramid (Burt and Adelson 1983) of (n, H, W, 3) -> {H: (n, 3, H, W), H / 2: ..., ...}: details, and what is left last."""
    kernel = torch.tensor([1., 4, 6, 4, 1]) / 16
    kernel = (kernel[:, None] * kernel).expand(3, 1, 5, 5)
    blur = lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode='reflect'), kernel, groups=3)
    x, bands = torch.from_numpy(rgb).permute(0, 3, 1, 2), {}
    while x.size(2) >= 2 * smallest and x.size(2) % 2 == 0:
        small = blur(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = 4 * small
        bands[x.size(2)] = x - blur(spread)
        x = small
    return {**bands, x.size(2): x}


def patches(x, rng, count=64, side=7):
    """So many random patches of each image (n, 3, H, W) -> (n * count, 3, side ** 2)."""
    n, _, h, w = x.shape
    y, left = rng.integers(0, h - side + 1, (n, count)), rng.integers(0, w - side + 1, (n, count))
    windows = x.unfold(2, side, 1).unfold(3, side, 1)  # (n, 3, H', W', side, side)
    return windows[torch.arange(n)[:, None], :, torch.from_numpy(y), torch.from_numpy(left)].reshape(n * count, 3, side * side)


def sliced_wasserstein(a, b, projections=256):
    """Sliced Wasserstein distance of 7x7 patches at each size of a Laplacian pyramid, x 1000 (Karras et al. 2018, arXiv 1710.10196): {size: distance}.

    Patches are normalised with mean and standard deviation of each channel in b, the real images. As many images in a as in b.
    """
    directions = F.normalize(torch.randn(3 * 49, projections, generator=torch.Generator().manual_seed(0)), dim=0)
    distances, a, b = {}, pyramid(a), pyramid(b)
    for size in a:
        pa, pb = patches(a[size], np.random.default_rng(1)), patches(b[size], np.random.default_rng(2))
        mean, std = pb.mean((0, 2), keepdim=True), pb.std((0, 2), keepdim=True)
        pa, pb = (((p - mean) / std).flatten(1) @ directions for p in (pa, pb))
        distances[size] = 1000 * (pa.sort(0).values - pb.sort(0).values).abs().mean().item()
    return distances


def colour_wasserstein(a, b):
    """Wasserstein-1 distance of a channel's levels, the mean of the three, in levels."""
    cdf = lambda x: np.stack([np.bincount(x[..., c].astype(int).ravel(), minlength=16).cumsum() / x[..., c].size for c in range(3)])
    return np.abs(cdf(a) - cdf(b)).sum(1).mean()


def colour_divergence(a, b):
    """Jensen-Shannon divergence of colours in 512 bins, 8 a channel, in bits: 0 if they are equal, 1 if they have nothing in common."""
    histogram = lambda x: np.bincount((x.astype(int) // 2 @ [64, 8, 1]).ravel(), minlength=512) / x[..., 0].size
    entropy = lambda p: -(p[p > 0] * np.log2(p[p > 0])).sum()
    p, q = histogram(a), histogram(b)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def anisotropy(rgb):
    """(|dx| - |dy|) / (|dx| + |dy|) of luminance: 0 if it varies as much across as down; horizontal streaks push it to -1."""
    y = luminance(rgb)
    dx, dy = np.abs(np.diff(y, axis=2)).mean(), np.abs(np.diff(y, axis=1)).mean()
    return (dx - dy) / (dx + dy)


def equal_left(tokens):
    """P(a token equals the one to its left)."""
    return (tokens[:, :, 1:] == tokens[:, :, :-1]).mean()


def equal_above(tokens):
    """P(a token equals the one above)."""
    return (tokens[:, 1:] == tokens[:, :-1]).mean()


def autocorrelation(rgb, lags=(1, 2, 4, 8)):
    """Correlation of luminance with itself so many pixels across and down: (2, len(lags))."""
    y = luminance(rgb)
    y = y - y.mean()
    across, down = ([(y[:, :, lag:] * y[:, :, :-lag]).mean() for lag in lags], [(y[:, lag:] * y[:, :-lag]).mean() for lag in lags])
    return np.array((across, down)) / (y ** 2).mean()


def layout(rgb):
    """Mean colour of each row, (H, 3): sky above, land below."""
    return rgb.mean((0, 2))


def power_spectrum(rgb):
    """log10 of the mean power of luminance at the spatial frequencies 1 .. H / 2 - 1, under a Hann window."""
    y = luminance(rgb)
    size = y.shape[1]
    power = (np.abs(np.fft.fft2((y - y.mean((1, 2), keepdims=True)) * np.hanning(size) * np.hanning(size)[:, None])) ** 2).mean(0)
    frequency = np.fft.fftfreq(size, 1 / size)
    radius = np.hypot(frequency, frequency[:, None]).round()
    return np.log10([power[radius == r].mean() for r in range(1, size // 2)])


def spectrum_slope(rgb):
    """Of log power over log frequency; about -2 to -3 for photographs, 0 for noise."""
    spectrum = power_spectrum(rgb)
    return np.polyfit(np.log10(np.arange(1, len(spectrum) + 1)), spectrum, 1)[0]


@torch.inference_mode()
def random_features(rgb, seed):
    """Means and standard deviations of the maps of a small convolution network that nobody has trained: (n, H, W, 3) -> (n, 192).

    Its orthogonal filters see edges and textures at three scales.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        filters = [torch.nn.init.orthogonal_(torch.empty(32, channels, 3, 3), gain=2 ** 0.5) for channels in (3, 32, 32)]
    out = []
    for x in torch.from_numpy(rgb).split(64):
        x, features = x.permute(0, 3, 1, 2) / 7.5 - 1, []
        for i, weight in enumerate(filters):
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode='reflect'), weight, stride=1 if i == 0 else 2))
            features += [x.mean((2, 3)), x.std((2, 3))]
        out.append(torch.cat(features, 1))
    return torch.cat(out).numpy()


def frechet(a, b):
    """Frechet distance of two sets of features (n, d), as if both were Gaussian."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()  # the trace of (ca cb) ** 0.5
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root


def density_coverage(fake, real, k=5):
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797) of points (n, d).

    How many real neighbourhoods (up to the k-th neighbour) a sample lies in, over k: fidelity; the share of real
    neighbourhoods with a sample in them: diversity. Both about 1 for real sets.
    """
    fake, real = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (fake, real))
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    inside = torch.cdist(fake, real) < radius
    return inside.sum(1).float().mean().item() / k, inside.any(0).float().mean().item()


def small(tokens):
    """Images averaged down to 16x16, as points (n, 768)."""
    parts = (torch.from_numpy(levels(part)).permute(0, 3, 1, 2) for part in np.array_split(tokens, -(-len(tokens) // 500)))
    return torch.cat([F.adaptive_avg_pool2d(part, 16).flatten(1) for part in parts]).numpy()


def nearest(points, train):
    """How far the closest training image is, mirrored or not, and which: points (n, 768) -> distances (n,), indices (n,), of twice len(train)."""
    mirrored = train.reshape(-1, 3, 16, 16)[..., ::-1].reshape(len(train), -1)
    distances, indices = torch.cdist(torch.from_numpy(points), torch.from_numpy(np.concatenate((train, mirrored)))).min(1)
    return distances.numpy(), indices.numpy()


def compare(tokens, real, train_points, seeds=5):
    """All measures of a set of images (n, H, W) against as many real ones -> {name: value}. train_points: small(training images)."""
    a, b = levels(tokens), levels(real)
    wasserstein = sliced_wasserstein(a, b)
    features = [(random_features(a, seed), random_features(b, seed)) for seed in range(seeds)]
    distances = [frechet(*pair) for pair in features]
    scale = features[0][1].std(0) + 1e-6
    pixels, looks = density_coverage(small(tokens), small(real)), density_coverage(*(f / scale for f in features[0]))
    correlations = np.abs(autocorrelation(a) - autocorrelation(b)).mean(1)
    (near, _), (near_real, _) = (nearest(small(x), train_points) for x in (tokens, real))
    return {
        **{f'sliced Wasserstein distance, {size}x{size}': distance for size, distance in wasserstein.items()},
        'sliced Wasserstein distance, mean': np.mean(list(wasserstein.values())),
        'colour: Wasserstein-1, levels': colour_wasserstein(a, b),
        'colour: Jensen-Shannon, bits': colour_divergence(a, b),
        'anisotropy': anisotropy(a),
        'P(equal to the left)': equal_left(tokens),
        'P(equal to the one above)': equal_above(tokens),
        'autocorrelation across, error': correlations[0],
        'autocorrelation down, error': correlations[1],
        'mean colour of rows, error in levels': np.abs(layout(a) - layout(b)).mean(),
        'power spectrum, slope': spectrum_slope(a),
        'power spectrum, error in log10': np.abs(power_spectrum(a) - power_spectrum(b)).mean(),
        'density, 16x16 pixels': pixels[0],
        'coverage, 16x16 pixels': pixels[1],
        'density, random features': looks[0],
        'coverage, random features': looks[1],
        'Frechet distance, random features': np.mean(distances),
        '... standard deviation over seeds': np.std(distances),
        'distance to the training set, over that of real images': np.median(near) / np.median(near_real),
        'closer to it than 99 % of real images': (near < np.quantile(near_real, 0.01)).mean(),
    }

# -----------------------------------------------------------------------------
# models


@torch.inference_mode()
def bits(model, tokens, what):
    """Bits per pixel of a model on images (n, H, W)."""
    batches = torch.from_numpy(tokens.reshape(len(tokens), -1).astype(np.int64)).to(model.lm_head.weight.device).split(4)
    return sum(model(batch).item() * len(batch) for batch in tqdm(batches, desc=what, leave=False)) / len(tokens) / math.log(2)


def paint(model, real, options):
    """As many images as there are in real, (n, H, W)."""
    n, height, width = real.shape
    prompts = np.zeros((n, 0)) if model.config.start_embedding else real[:, 0, :1]
    generator = torch.Generator().manual_seed(1)
    with tqdm(total=n * (height * width - prompts.shape[1]), unit='px', unit_scale=True, desc='painting', leave=False) as bar:
        return model.generate(prompts, generator=generator, progress=bar.update, **options).cpu().numpy().reshape(real.shape)


def frequencies(train, real):
    """Images of pixels that know nothing of each other -> images (n, H, W), and bits per pixel on them and on real ones."""
    p = np.bincount(train.ravel(), minlength=extras.VOCAB_SIZE) + 1.0
    p /= p.sum()
    tokens = np.random.default_rng(1).choice(len(p), size=real.shape, p=p)
    return tokens, *(-np.log2(p[x]).mean() for x in (tokens, real))


def sampling(text):
    """'temperature=0.9,top_p=0.95' -> options of GPT.generate."""
    options = dict(pair.split('=') for pair in text.split(',') if pair != 'plain')
    return {name: int(value) if name == 'top_k' else float(value) for name, value in options.items()}


def pairs(tokens, train, path, count=8):
    """Save the samples that are closest to a training image, above this one."""
    distances, indices = nearest(small(tokens), small(train))
    closest = np.argsort(distances)[:count]
    theirs = [train[i % len(train)][:, ::-1 if i >= len(train) else 1] for i in indices[closest]]
    extras.save_picture(extras.sheet([extras.to_image(image, scale=2) for image in (*tokens[closest], *theirs)], count), path)


def plot(columns, iterations, path):
    """What is seen over training and over bits per pixel of the validation images. iterations: {column: of its checkpoint}."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    distance, bits_per_pixel = 'sliced Wasserstein distance, mean', 'bits per pixel, validation'
    value = {**{measure: [columns[name][measure] for name in iterations] for measure in (distance, 'anisotropy', bits_per_pixel)}, 'iteration': list(iterations.values())}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout='constrained')
    for ax, x, y in zip(axes, ('iteration', bits_per_pixel, bits_per_pixel), (distance, distance, 'anisotropy')):
        ax.plot(value[x], value[y], 'o-')
        for iteration, *at in zip(value['iteration'], value[x], value[y]) if x != 'iteration' else ():
            ax.annotate(iteration, at, textcoords='offset points', xytext=(4, 6), fontsize=8)
        ax.axhline(columns['floor'][y], color='grey', linestyle=':', label='training photographs')
        ax.set(xlabel=x, ylabel=y)
        if x == 'iteration':
            ax.set_xscale('log')
            ax.minorticks_off()
            ax.set_xticks(value[x], value[x])
        else:
            ax.invert_xaxis()  # training goes to the right
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', nargs='+', required=True, help="checkpoints, or 'frequencies'")
    parser.add_argument('--data', default='data/photos')
    parser.add_argument('--num_samples', type=int, default=1000)
    parser.add_argument('--sampling', nargs='+', default=['plain'], help="options of the sampler, as in temperature=0.9,top_p=0.95; 'plain' for none")
    parser.add_argument('--out', type=Path, default=ROOT / 'out' / 'quality')
    args = parser.parse_args()
    began = time.time()
    device = extras.pick_device('auto')
    meta = extras.load_meta(args.data)
    train, val = (extras.load_tokens(args.data, split, meta).reshape(-1, meta['height'], meta['width']) for split in ('train', 'val'))
    n, rng = min(args.num_samples, len(val), len(train)), np.random.default_rng(0)
    real, floor = rng.permutation(val)[:n], rng.permutation(len(train))[:n]
    points = small(train)
    left_out = np.delete(points, floor, axis=0)  # the floor is no copy of what it is compared with
    args.out.mkdir(parents=True, exist_ok=True)
    columns = {'validation': {'anisotropy': anisotropy(levels(real)), 'P(equal to the left)': equal_left(real), 'P(equal to the one above)': equal_above(real),
                              'power spectrum, slope': spectrum_slope(levels(real))},
               'floor': compare(train[floor], real, left_out)}
    iterations, rows = {}, []
    for path in args.ckpt:
        if path == 'frequencies':
            tokens, own, theirs = frequencies(train, real)
            columns[path] = {**compare(tokens, real, points), 'bits per pixel, validation': theirs, 'bits per pixel, its samples': own}
            continue
        checkpoint = extras.load_checkpoint(path, device)
        model = extras.build_model(checkpoint, path, device)
        on_real = bits(model, real, 'validation')
        for text in args.sampling:
            model_name = path if len({Path(p).stem for p in args.ckpt}) < len(args.ckpt) else Path(path).stem
            name = model_name if text == 'plain' else f'{model_name} {text}' if len(args.ckpt) > 1 else text
            tokens = paint(model, real, sampling(text))
            columns[name] = {**compare(tokens, real, points), 'bits per pixel, validation': on_real, 'bits per pixel, its samples': bits(model, tokens, 'samples')}
            iterations[name] = checkpoint.get('iter_num', 0)
            print(f'{name} after {(time.time() - began) / 60:.0f} min', file=sys.stderr)
            pairs(tokens, train, args.out / 'pairs.png')
            rows += [extras.to_image(image) for image in tokens[:9]]
    if len(set(iterations.values())) > 1:
        plot(columns, iterations, args.out / 'run.png')
        extras.save_picture(extras.sheet(rows, 9), args.out / 'training.png')
    print(f'{n} images in each set\n\n| measure | {" | ".join(columns)} |\n|---|{"---|" * len(columns)}')
    for measure in list(columns.values())[-1]:
        print(f'| {measure} | ' + ' | '.join(f'{column[measure]:.3g}' if measure in column else '' for column in columns.values()) + ' |')


if __name__ == '__main__':
    extras.run(main)

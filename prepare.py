"""Turn pictures into tokens: any source -> data/<dataset>/train.bin, val.bin, meta.pkl and preview.png.

    python prepare.py                                              # ferrariedhgs/Nature-Landscape from the Hugging Face Hub
    python prepare.py --source ~/Pictures --out_dir data/mine      # a folder, with all folders in it
    python prepare.py --source 'shards/*.parquet' --out_dir data/mine
    python prepare.py --source synthetic --out_dir data/synthetic  # landscapes drawn here, no download

A .bin file is raw little-endian uint16, one image a row of size * size tokens in raster order.
"""
import contextlib
import functools
import glob
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import warnings

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

import extras
from extras import UserError

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif')

# -----------------------------------------------------------------------------
# sources: objects with a length, name(i), and rgb(i, size) -> (size, size, 3) uint8

class Folder:
    """All picture files below a folder, in the order of their relative paths."""

    def __init__(self, root):
        self.root, self.paths, self.ignored = root, [], []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [d for d in subfolders if not d.startswith('.')]
            for name in files:
                if not name.startswith('.'):
                    path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
                    (self.paths if name.lower().endswith(ENDINGS) else self.ignored).append(path)
        self.paths.sort()  # the order of a directory differs from disk to disk

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return self.paths[i]

    def rgb(self, i, size):
        return extras.load_rgb(os.path.join(self.root, self.paths[i]), size)


class Table:
    """The image column of a datasets.DatasetDict (Hub or parquet): every row of every split, in the order of split names."""

    def __init__(self, splits):
        import datasets
        parts = []
        for name in sorted(splits):
            column = image_column(splits[name].features)
            part = splits[name].select_columns([column])
            if isinstance(part.features[column], datasets.Image):
                part = part.cast_column(column, datasets.Image(decode=False))  # bytes, to be decoded in the workers
            parts.append((name, column, part))
        self.parts, self.ignored = parts, []

    def __len__(self):
        return sum(len(part) for *_, part in self.parts)

    def _find(self, i):
        for name, column, part in self.parts:
            if i < len(part):
                return name, column, part, i
            i -= len(part)

    def name(self, i):
        split, _, _, row = self._find(i)
        return f'row {row} of {split}'

    def rgb(self, i, size):
        _, column, part, row = self._find(i)
        image = part[row][column]
        if isinstance(image, dict):
            image = image['bytes'] if image['bytes'] is not None else image['path']
        if image is None:
            raise ValueError('empty cell')
        return extras.load_rgb(io.BytesIO(image) if isinstance(image, bytes) else image, size)


def image_column(features):
    """The first column that holds images: by type Image, else {bytes, path} or plain bytes, as older files have it. Raises UserError."""
    import datasets
    binary = [datasets.Value('binary'), datasets.Value('large_binary')]
    for fits in (lambda f: isinstance(f, datasets.Image),
                 lambda f: isinstance(f, dict) and f.get('bytes') in binary and 'path' in f,
                 lambda f: f in binary):
        for column, feature in features.items():
            if fits(feature):
                return column
    raise UserError(f'no column of images among {list(features)}: a column has to be of the type Image, or to hold the bytes of image files')


class Synthetic:
    """Procedural landscapes; number i depends on (seed, i) alone."""

    def __init__(self, count, seed):
        self.count, self.seed, self.ignored = count, seed, []

    def __len__(self):
        return self.count

    def name(self, i):
        return f'landscape {i}'

    def rgb(self, i, size):
        return draw_landscape(np.random.default_rng([self.seed, i]), size)


def open_source(args, cache_dir):
    """args.source -> Folder, Table or Synthetic. Raises UserError."""
    source = args.source
    if source == 'synthetic':
        return Synthetic(args.num_images or 10_000, args.seed)
    shards = (sorted(glob.glob(source)) or [source]) if source.endswith('.parquet') else []
    if os.path.isdir(source):
        folder = Folder(source)
        shards = [os.path.join(source, p) for p in sorted(folder.ignored) if p.endswith('.parquet')]
        if len(folder) or not shards:
            return folder
    if not shards and (os.path.exists(source) or source.count('/') > 1 or source.startswith(('.', '~'))):
        raise UserError(f'--source {source} is no folder and no .parquet file: give one of these, a Hub id like owner/name, or synthetic')
    for s in shards:
        if not os.path.isfile(s):
            raise UserError(f'--source {source}: there is no file {s}')
    try:
        import datasets
    except ImportError as e:  # missing, or its pyarrow and the installed NumPy do not fit each other
        raise UserError(f'cannot import datasets ({e}): install versions that fit, or use a folder of pictures') from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    try:
        if shards:
            return Table(datasets.load_dataset('parquet', data_files={'rows': shards}, cache_dir=cache_dir))
        return Table(datasets.load_dataset(source))
    except UserError:
        raise
    except Exception as e:  # the network, the Hub, a damaged file: all come from below with their own classes
        raise UserError(f'cannot load {source} ({extras.brief(e)}): check the name' + ('' if shards else ' and the network, or try --source synthetic')) from None

# -----------------------------------------------------------------------------
# synthetic landscapes
#
# Only + - * / and comparisons of float64 and the raw uniform numbers of PCG64, which IEEE 754 and NumPy's stream
# guarantee give to the last bit on every machine. No sin, exp or power, no sum whose order a processor may choose.

def mix(a, b, t):
    return a + (b - a) * t


def smoothstep(t):
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def noise(rng, y, x, octaves=4):
    """Value noise, octaves summed, about 0..1: at octave o the lattice has cells of 2**-o. x, y: (h, w), from 0 up to 32."""
    total, weight = 0.0, 1.0
    for octave in range(octaves):
        lattice = rng.random((64, 64))
        yy, xx = y * (1 << octave), x * (1 << octave)
        i, j = yy.astype(np.int64), xx.astype(np.int64)
        fy, fx = smoothstep(yy - i), smoothstep(xx - j)
        at = lambda di, dj: lattice[(i + di) & 63, (j + dj) & 63]
        total = total + weight * mix(mix(at(0, 0), at(0, 1), fx), mix(at(1, 0), at(1, 1), fx), fy)
        weight = weight * 0.5
    return total / (2.0 - 2.0 * weight)


#            zenith           horizon          light: colours of the ground are multiplied by it
HOURS = [([58, 118, 200], [186, 216, 240], [1.00, 0.98, 0.92]),  # noon
         ([84, 140, 214], [226, 232, 236], [0.95, 0.94, 0.90]),  # hazy day
         ([112, 146, 206], [252, 222, 196], [0.94, 0.84, 0.76]),  # morning
         ([70, 76, 140], [252, 160, 92], [0.84, 0.60, 0.48]),  # sunset
         ([40, 38, 92], [214, 108, 120], [0.56, 0.42, 0.50]),  # dusk
         ([128, 140, 154], [204, 208, 212], [0.70, 0.72, 0.74]),  # overcast
         ([14, 20, 52], [62, 80, 132], [0.30, 0.36, 0.54])]  # night
NIGHT = len(HOURS) - 1
GROUNDS = [([120, 160, 62], [56, 104, 40]), ([164, 170, 78], [96, 112, 44]), ([206, 184, 112], [140, 108, 56]),  # meadow, dry grass, sand
           ([232, 238, 246], [176, 194, 220]), ([150, 110, 128], [92, 66, 84])]  # snow, heather
WOODS = [[34, 70, 44], [48, 84, 40], [28, 58, 56], [128, 76, 34], [150, 106, 40]]  # spruce, beech, pine, autumn


def draw_landscape(rng, size):
    """One landscape from the random numbers of rng -> (size, size, 3) uint8: sky above, land (and often a lake) below.

    Painted from back to front at twice the size, every layer a mask and a colour, then averaged in integers.
    """
    s = 2 * size
    y, x = (np.mgrid[0:s, 0:s] + 0.5) / s
    row = x[:1]  # (1, s): what depends on the column alone
    uniform = lambda low, high: low + (high - low) * rng.random()
    choose = lambda options: options[int(rng.random() * len(options))]
    colour = lambda c: np.array(c, np.float64) + 14.0 * (2.0 * rng.random(3) - 1.0)

    hour = int(rng.random() * len(HOURS))
    zenith, haze = colour(HOURS[hour][0]), colour(HOURS[hour][1])
    light = np.array(HOURS[hour][2]) * uniform(0.9, 1.08)
    horizon = uniform(0.42, 0.68)

    # sky, with the glow of the sun or moon
    fall = np.clip(y / horizon, 0.0, 1.0)[..., None]
    picture = mix(zenith, haze, fall if rng.random() < 0.5 else fall * fall)
    sun_x, sun_y = uniform(0.08, 0.92), horizon * (uniform(0.75, 1.0) if hour in (3, 4) else uniform(0.15, 0.6))
    radius = uniform(0.025, 0.06)
    disc = lambda cx, cy: smoothstep((radius * radius - (x - cx) * (x - cx) - (y - cy) * (y - cy)) * s / radius)
    glow = 1.0 / (1.0 + ((x - sun_x) * (x - sun_x) + (y - sun_y) * (y - sun_y)) * uniform(20.0, 90.0))
    if hour == NIGHT:
        for star in rng.random((48, 3)):
            picture[int(star[0] * horizon * s), int(star[1] * s)] += 200.0 * star[2]
        moon = disc(sun_x, sun_y) * (1.0 - disc(sun_x + radius * uniform(0.3, 1.2), sun_y - 0.3 * radius))
        picture = mix(picture, np.array([236.0, 234.0, 214.0]), np.maximum(moon, 0.25 * glow * glow)[..., None])
    elif hour != 5:  # no sun through an overcast sky
        warm = np.array([255.0, 240.0, 200.0]) if hour < 3 else np.array([255.0, 206.0, 130.0])
        picture = mix(picture, warm, np.maximum(disc(sun_x, sun_y), 0.55 * glow)[..., None])

    # clouds, flatter and thinner towards the horizon
    cover = uniform(0.30, 0.75) if hour != 5 else uniform(0.2, 0.4)
    billows = noise(rng, y * uniform(3.0, 7.0), x * uniform(1.5, 3.0))
    density = smoothstep((billows - cover) * 4.0) * smoothstep((horizon - y) * 5.0)
    lit = mix(haze, np.full(3, 255.0), uniform(0.2, 0.7)) * np.maximum(light, 0.3)
    picture = mix(picture, mix(lit, 0.72 * lit, smoothstep((billows - cover - 0.1) * 4.0)[..., None]), 0.9 * density[..., None])

    # ridges, the farther the hazier; sides turned to the sun are brighter, high ones carry snow
    ridges = int(rng.random() * 4)
    snow_line = horizon - uniform(0.08, 0.35)
    for k in range(ridges):
        near = (k + 1.0) / (ridges + 1.0)
        height = uniform(0.14, 0.46) * (1.2 - near)
        base = horizon + 0.03 * near
        line = row * uniform(1.5, 3.0) + uniform(0.0, 9.0)
        massif, jags = noise(rng, row * 0.0, line, 3), noise(rng, row * 0.0, line * 8.0, 3)
        crest = massif + 0.16 * (jags - 0.5)
        top = base - height * (0.2 + 1.3 * crest * crest + 0.25 * crest)
        side = np.roll(massif, -2, axis=1) - np.roll(massif, 2, axis=1)  # > 0 where the mountain falls to the left
        face = noise(rng, y * 5.0, (x + (y - top) * uniform(-1.5, 1.5) + 2.0) * 5.0, 3)  # rocks run downhill
        bright = 0.85 + 0.8 * (face - 0.5) + np.clip(np.where(sun_x > x, -side, side) * s * 0.03, -0.12, 0.12)
        rock = mix(colour([112, 104, 104]), colour(choose(WOODS)), near * rng.random())
        body = rock * light * np.clip(bright, 0.35, 1.4)[..., None]
        white = smoothstep((snow_line - y + 0.12 * (face - 0.5)) * 24.0)
        body = mix(body, np.array([240.0, 244.0, 252.0]) * light * np.clip(bright + 0.15, 0.6, 1.1)[..., None], white[..., None])
        body = mix(body, haze, 0.72 * (1.0 - near))
        picture = np.where((y > top)[..., None], body, picture)

    # rolling ground up to the horizon, grain growing with nearness
    far, close = (colour(c) for c in choose(GROUNDS))
    swell = horizon - 0.05 * (noise(rng, row * 0.0, row * 2.0 + 5.0, 3) - 0.5)
    depth = np.clip((y - swell) / (1.0 - swell), 0.0, 1.0)
    grain = noise(rng, 4.0 / (0.12 + depth), x * uniform(3.0, 6.0), 4)
    ground = mix(far, close, depth[..., None]) * light * (0.72 + 0.56 * grain)[..., None]
    ground = mix(haze * np.maximum(light, 0.35), ground, smoothstep(0.35 + depth * 5.0)[..., None])
    if rng.random() < 0.35:  # flowers
        petals = colour(choose([[230, 200, 60], [200, 70, 80], [190, 120, 210], [245, 245, 240]]))
        bloom = rng.random((64, 64))[(y * 64.0).astype(np.int64), (x * 64.0).astype(np.int64)] < 0.1 * depth
        ground = np.where(bloom[..., None], petals * light, ground)
    land = y > swell
    picture = np.where(land[..., None], ground, picture)

    # a forest along the horizon: conifers are triangles, broad-leaved trees are domes
    shore = uniform(0.02, 0.12)
    if rng.random() < 0.65:
        trees = rng.random((int(uniform(12.0, 46.0)), 3))
        tall, domes, leaves = uniform(0.06, 0.2), rng.random() < 0.4, colour(choose(WOODS))
        reach = tall * (0.35 + 0.65 * trees[:, 1:2])
        gap = np.abs(row - (trees[:, :1] * 1.1 - 0.05)) / (reach * (0.55 if domes else 0.28))
        crown = reach * np.clip(1.0 - (gap * gap if domes else gap), 0.0, 1.0)
        foot = horizon + shore
        forest = (y > foot - np.maximum(crown.max(axis=0), 0.3 * tall)) & (y < foot)
        leafage = noise(rng, y * 14.0, x * 14.0, 2)
        picture = np.where(forest[..., None], leaves * light * (0.5 + 0.9 * leafage)[..., None], picture)

    # a lake: what stands above the waterline, upside down, shaken and tinted
    if rng.random() < 0.45:
        water = horizon + shore
        bank = mix(water, 1.0, uniform(0.55, 1.2)) + 0.12 * (noise(rng, row * 0.0, row * 2.0, 4) - 0.5)
        ripple = noise(rng, y * 24.0, x * 3.0, 2) - 0.5
        away = np.clip((y - water) / (1.0 - water), 0.0, 1.0)
        source_y = np.clip((2.0 * water - y + 0.02 * ripple) * s, 0, s - 1).astype(np.int64)
        source_x = np.clip((x + 0.06 * ripple * away) * s, 0, s - 1).astype(np.int64)
        mirror = mix(picture[source_y, source_x], mix(zenith, np.array([20.0, 60.0, 80.0]), 0.5) * np.maximum(light, 0.3), 0.25 + 0.35 * away[..., None])
        mirror = mirror * (0.9 + 0.3 * ripple)[..., None]
        picture = np.where(((y > water) & (y < bank))[..., None], mirror, picture)

    picture = np.clip(picture, 0.0, 255.0).astype(np.uint16).reshape(size, 2, size, 2, 3)
    return ((picture[:, 0, :, 0] + picture[:, 0, :, 1] + picture[:, 1, :, 0] + picture[:, 1, :, 1] + 2) >> 2).astype(np.uint8)

# -----------------------------------------------------------------------------
# from a source to files

def read(source, size, indices):
    """What a worker does with a few pictures: [(index, its tokens as bytes, None) or (index, None, why it cannot be read)]."""
    rows = []
    for i in indices:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # Pillow's grumbling about odd EXIF; what it cannot read raises
                rows.append((i, extras.pack_rgb(source.rgb(i, size)).astype('<u2').tobytes(), None))
        except Exception as e:  # a damaged file can raise nearly anything
            rows.append((i, None, f'{type(e).__name__}: {extras.brief(e)}'))
    return rows


def follow_parent(_):
    """In a worker: end when the parent is killed, instead of waiting for it for ever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def split_order(keys, val_fraction):
    """(n,) uint64 keys, equal for equal images -> (train, val) indices, each in the order of the keys.

    The keys are hashes of pixels and seed: an order as good as random that depends neither on names nor on the machine.
    Equal images are neighbours in it, and the cut between the two sides moves until it separates none of them.
    """
    order = np.argsort(keys, kind='stable')
    ranked = keys[order]
    cuts = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1  # where the next image is another one
    if not len(cuts):
        raise UserError('all usable images are the same picture: training and validation need at least two different ones')
    cut = cuts[np.abs(cuts - len(keys) * val_fraction).argmin()]
    return order[cut:], order[:cut]


def write_dataset(source, args, staging):
    """Read every picture of source with all workers; write train.bin, val.bin, meta.pkl, preview.png into staging.

    Memory stays constant: rows go to a scratch file as they come, in the order of the source, and are copied from there
    in the order of the split; only a key of 64 bits is kept of each. Returns (meta, names of unreadable pictures with
    the reasons, (lowest, highest) token).
    """
    count = min(len(source), args.num_images or len(source))
    row = 2 * args.size * args.size  # bytes of one image
    loader = DataLoader(range(count), batch_size=16, collate_fn=functools.partial(read, source, args.size),
                        num_workers=min(args.workers, count), worker_init_fn=follow_parent)
    keys, skipped = bytearray(), []
    with open(os.path.join(staging, 'rows'), 'w+b') as rows:
        with tqdm(total=count, unit='image', desc='reading') as bar:
            for batch in loader:
                for i, tokens, reason in batch:
                    if tokens is None:
                        skipped.append(f'{source.name(i)} ({reason})')
                    else:
                        rows.write(tokens)
                        keys += hashlib.blake2b(tokens, digest_size=8, salt=args.seed.to_bytes(8, 'little')).digest()
                bar.update(len(batch))
        if not keys:
            raise UserError(f'no usable image in {args.source}' + (f': {len(skipped)} could not be read, e.g. {skipped[0]}' if skipped else
                            f': it holds no {", ".join(ENDINGS)}'))
        meta = dict(vocab_size=extras.VOCAB_SIZE, height=args.size, width=args.size, tokens_per_image=args.size * args.size,
                    bits_per_channel=4, order='raster', source=args.source)
        low, high = extras.VOCAB_SIZE, 0
        for split, order in zip(('train', 'val'), split_order(np.frombuffer(keys, '<u8'), args.val_fraction)):
            meta[f'{split}_images'] = len(order)
            with open(os.path.join(staging, f'{split}.bin'), 'wb') as f:
                for i in tqdm(order.tolist(), unit='image', desc=f'writing {split}.bin'):
                    rows.seek(i * row)
                    tokens = rows.read(row)
                    f.write(tokens)
                    values = np.frombuffer(tokens, '<u2')
                    low, high = min(low, int(values.min())), max(high, int(values.max()))
    os.remove(os.path.join(staging, 'rows'))
    with open(os.path.join(staging, 'meta.pkl'), 'wb') as f:
        pickle.dump(meta, f, protocol=4)
    first = extras.load_tokens(staging, 'train', meta)[:64].reshape(-1, args.size, args.size)
    extras.save_picture(extras.sheet([extras.to_image(tokens) for tokens in first]), os.path.join(staging, 'preview.png'))
    return meta, skipped, (low, high)


def publish(staging, out_dir):
    """Move the finished files into out_dir. meta.pkl is removed first and comes last, so that no mixture of old and new files ever loads."""
    if hasattr(signal, 'pthread_sigmask'):  # not even Ctrl-C comes between, which would leave neither
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(out_dir, 'meta.pkl'))
    for name in ('train.bin', 'val.bin', 'preview.png', 'meta.pkl'):
        os.replace(os.path.join(staging, name), os.path.join(out_dir, name))
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def main(argv=None):
    parser = extras.Parser(description='Turn pictures into 12-bit colour tokens.')
    parser.add_argument('--source', default='ferrariedhgs/Nature-Landscape', help='Hub id, folder of pictures, .parquet files, or synthetic')
    parser.add_argument('--out_dir', default=os.path.join(extras.ROOT, 'data', 'landscape'), help='where train.bin, val.bin, meta.pkl and preview.png go')
    parser.add_argument('--size', type=int, default=64, help='height and width in pixels')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share of the images kept for validation')
    parser.add_argument('--seed', type=int, default=1337, help='decides the split and the order, and the synthetic landscapes')
    parser.add_argument('--num_images', type=int, default=0, help='use only so many images (0: all; 10,000 if synthetic)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that decode; the result does not depend on it')
    args = parser.parse_args(argv)
    extras.check_values(args, size=('from 2 to 1024', 2 <= args.size <= 1024), val_fraction=('between 0 and 1', 0 < args.val_fraction < 1),
                        seed=('from 0 to 2 ** 63 - 1', 0 <= args.seed < 2 ** 63), num_images=('0 or more', args.num_images >= 0), workers=('0 or more', args.workers >= 0))
    extras.make_folder(args.out_dir)
    staging = os.path.join(args.out_dir, '.partial')
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    os.mkdir(staging)
    try:
        source = open_source(args, staging)
        try:
            meta, skipped, (low, high) = write_dataset(source, args, staging)
        except RuntimeError as e:  # of the DataLoader: the system has killed a worker
            raise UserError(f'{extras.brief(e)}: if memory ran out, try --workers 1') from None
        publish(staging, args.out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    for name in skipped:
        print(f'skipped {name}')
    if source.ignored:
        print(f'ignored {len(source.ignored):,} files that are no pictures by their names, e.g. {source.ignored[0]}')
    print(f"{meta['train_images'] + meta['val_images']:,} images of {args.size}x{args.size}: {meta['train_images']:,} for training, "
          f"{meta['val_images']:,} for validation; {len(skipped):,} unreadable ones skipped")
    print(f'tokens from 0x{low:03x} to 0x{high:03x} of 0x000 to 0xfff, {args.size * args.size:,} an image')
    print(f"wrote train.bin, val.bin, meta.pkl to {args.out_dir}; look at {os.path.join(args.out_dir, 'preview.png')}")


if __name__ == '__main__':
    extras.run(main)

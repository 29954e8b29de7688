"""Turn pictures into tokens: data/<dataset>/train.bin, val.bin, meta.pkl and preview.png.

    python prepare.py                                              # ferrariedhgs/Nature-Landscape from the Hub
    python prepare.py --source ~/Pictures --out_dir data/mine      # a folder, with all folders in it
    python prepare.py --source shards/*.parquet more/*.jpg --val_source data/mine --out_dir data/more
    python prepare.py --source synthetic --out_dir data/synthetic  # landscapes drawn here, no download

A .bin file is raw little-endian uint16, one image a row of height * width tokens in raster order.
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import threading

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import extras
from extras import UserError

# in the names of parquet files and of their folders
SPLITS = 'train|validation|valid|val|dev|test|eval'
WRITTEN = {'train.bin', 'val.bin', 'preview.png', 'meta.pkl'}

# -----------------------------------------------------------------------------
# sources have len(), name(i), picture(i), which extras.load_rgb reads, and split, the name of a split or None

class Files:
    """Picture files."""

    def __init__(self, paths):
        self.paths, self.split = paths, None

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return self.paths[i]

    picture = name


class Table:
    """A column of one split of a data set: each cell holds a picture or a list of pictures."""

    def __init__(self, split, rows, column):
        import pyarrow.compute
        self.split, self.rows = split, rows.select_columns([column]).with_format('arrow')
        self.items = None  # for lists: (row, item) of every picture
        cells = some_rows(rows)[column].to_pylist()
        if any(map(is_list_of_files, cells)):
            lengths = pyarrow.compute.list_value_length(self.rows.data.column(column)).fill_null(0).to_numpy()
            self.items = [(row, item) for row, length in enumerate(lengths.tolist()) for item in range(length)]

    def __len__(self):
        return len(self.rows if self.items is None else self.items)

    def name(self, i):
        if self.items is None:
            return f'row {i} of {self.split}'
        row, item = self.items[i]
        return f'row {row} of {self.split}, item {item}'

    def picture(self, i):
        row, item = (i, 0) if self.items is None else self.items[i]
        return to_picture(items(self.rows[row].column(0)[0].as_py())[item])


def is_list_of_files(cell):
    """Return whether a cell of a table holds several pictures; a list of numbers holds the pixels of one."""
    return isinstance(cell, list) and cell and all(item is None or isinstance(item, (dict, bytes)) for item in cell)


def items(cell):
    """Return the pictures in a cell of a table."""
    return cell if is_list_of_files(cell) else [cell]


def to_picture(item):
    """Return what extras.load_rgb reads of bytes, a dict(bytes, path) as on the Hub, or pixels. Raises ValueError."""
    if isinstance(item, dict):
        item = item.get('bytes') or item.get('path')
        if isinstance(item, str):
            return item
    if not item:
        raise ValueError('empty cell')
    if isinstance(item, bytes):
        return io.BytesIO(item)
    pixels = np.squeeze(item)  # (h, w), (h, w, 3) or (3, h, w)
    if pixels.dtype.kind not in 'iuf' or pixels.ndim not in (2, 3):
        raise ValueError('no picture')
    if pixels.ndim == 3 and pixels.shape[0] in (3, 4) and pixels.shape[2] not in (3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    bytes_already = pixels.dtype.kind in 'iu' and pixels.max() < 256
    return Image.fromarray(pixels.astype(np.uint8) if bytes_already else extras.to_levels(pixels))


class Prepared:
    """One split of a data set that this program has made."""

    def __init__(self, folder, split):
        self.folder, self.split, self.meta = folder, split, extras.load_meta(folder)

    def __len__(self):
        return self.meta[f'{self.split}_images']

    def name(self, i):
        return f'image {i} of {self.folder}/{self.split}.bin'

    def picture(self, i):  # opened anew, so that a worker gets a few words instead of the whole file
        tokens = extras.load_tokens(self.folder, self.split, self.meta)[i]
        return Image.fromarray(extras.unpack_rgb(tokens.reshape(self.meta['height'], self.meta['width'])))


class Synthetic:
    """Procedural landscapes; number i depends on (seed, i) alone."""

    def __init__(self, count, seed, size):
        self.count, self.seed, self.size, self.split = count, seed, size, None

    def __len__(self):
        return self.count

    def name(self, i):
        return f'landscape {i}'

    def picture(self, i):
        return Image.fromarray(draw_landscape(np.random.default_rng([self.seed, i]), self.size))


def open_sources(texts, args, cache_dir):
    """Open what was typed after --source or --val_source. Return a list of sources. Raises UserError."""
    sources, files = [], []
    for text in texts:
        paths = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if text == 'synthetic':
            sources.append(Synthetic(args.num_images or 10_000, args.seed, max(args.size)))
        elif paths:
            for path in paths:
                if os.path.isdir(path):
                    sources += open_folder(path, args, cache_dir)
                else:
                    files.append(path)
        elif re.fullmatch(r'(?!\.)[\w.-]+/[\w.-]+', text) and not text.lower().endswith('.parquet'):  # a Hub id
            sources += open_tables(text, args)
        else:
            raise UserError(f'there is no file or folder {text}: give one, a Hub id like owner/name, or synthetic')
    pictures, shards, others = sort_files(files)
    say_unused(others, 'no pictures')
    if pictures:
        sources.append(Files(pictures))
    if shards:
        sources += open_tables('parquet', args, shards, cache_dir)
    return sources


def open_folder(folder, args, cache_dir):
    """Open a folder of pictures or parquet files, a clone from the Hub, or a prepared data set. Return its sources."""
    pictures, shards, others = sort_files(find_files(folder))
    if not pictures and not shards and os.path.exists(os.path.join(folder, 'meta.pkl')):
        return [Prepared(folder, split) for split in ('train', 'val')]
    tables = []
    if shards and (args.config or has_configurations(folder)):
        tables = open_tables(folder, args, cache_dir=cache_dir)
    elif shards:
        tables = open_tables('parquet', args, shards, cache_dir, required=not pictures)
    if tables:
        say_unused(pictures, 'beside parquet files')
    else:
        others += shards
    say_unused(others, 'no pictures')
    return tables or [Files(pictures)]


def open_all(args, cache_dir):
    """Open --source and --val_source, which may name a split of it. Return both lists of sources. Raises UserError."""
    sources = open_sources(args.source, args, cache_dir)
    val_sources = [source for source in sources if source.split and source.split in args.val_source]
    sources = [source for source in sources if source not in val_sources]
    for text in args.val_source:
        if text in {source.split for source in val_sources}:
            continue
        within = [] if os.path.exists(text) else [
            path for path in (os.path.join(source, text) for source in args.source) if os.path.isdir(path)]
        splits = sorted({source.split for source in sources if source.split})
        if splits and not within and text != 'synthetic' and '/' not in text and not os.path.exists(text):
            raise UserError(f'--val_source {text} is no file, no folder and none of the splits ' + ', '.join(splits))
        opened = open_sources(within or [text], args, cache_dir)
        val_sources += [source for source in opened if not (isinstance(source, Prepared) and source.split == 'train')]
    return sources, val_sources


def find_files(root):
    """Return the paths of all files below a folder but hidden ones and those that this program wrote.

    Linked folders are followed, each once.
    """
    paths, seen, home = [], set(), os.path.realpath(root)
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or home.startswith(os.path.join(real, '')):  # seen, or above the root
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        ours = WRITTEN if WRITTEN <= set(names) else ()
        paths += [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.') and name not in ours]
    return paths


def sort_files(paths):
    """Return (pictures, parquet files, others). Pipes and devices are never opened."""
    pictures, shards, others = [], [], []
    for path in paths:
        if not os.path.isfile(path) and os.path.exists(path):
            others.append(path)
        elif path.lower().endswith('.parquet'):
            shards.append(path)
        else:
            (pictures if extras.is_picture(path) else others).append(path)
    return pictures, shards, others


def say_unused(paths, why):
    """Print how many files are not used, and why."""
    if paths:
        same = os.path.join(glob.escape(os.path.dirname(paths[0])), '*' + os.path.splitext(paths[0])[1])
        hint = f'; for those  --source {extras.quote(same)}'
        if why == 'no pictures':
            endings = {os.path.splitext(path)[1].lower() for path in paths}
            hint = '; convert .heic to .jpg' if '.heic' in endings else '; unpack .zip' if '.zip' in endings else ''
        print(f"not used: {len(paths):,} file{'s' * (len(paths) > 1)} ({why}), e.g. {paths[0]}{hint}")


def has_configurations(folder):
    """Return whether the card of a data set, the head of its README.md, says which of its files belong together."""
    try:
        with open(os.path.join(folder, 'README.md'), errors='replace') as f:
            head = f.read(100_000).split('\n---', 1)[0]  # the YAML between two lines of ---
            return head.startswith('---\n') and '\nconfigs:' in head
    except OSError:
        return False


def by_split(shards, links):
    """Return {split: [path]} of parquet files that hold rows, by the splits that their names tell. Raises UserError.

    load_dataset expands more wildcards than glob.escape knows. So it gets plain names: links in the folder links, where
    links can be made.
    """
    import pyarrow.parquet
    files = {}
    for i, shard in enumerate(shards):
        try:
            with open(shard, 'rb') as f:
                rows = pyarrow.parquet.read_metadata(f).num_rows
        except Exception as e:
            raise UserError(f'{shard} is no whole parquet file ({extras.brief(e, 60)}): get it again (git lfs pull, in '
                            'a clone), or move it away') from None
        if not rows:  # which load_dataset cannot read
            continue
        folder, file = os.path.abspath(shard).lower().split(os.sep)[-2:]
        split = re.search(rf'(?<![a-z])({SPLITS})(?![a-z])', file) or re.fullmatch(SPLITS, folder)
        plain = glob.escape(shard)
        with contextlib.suppress(OSError):
            os.symlink(os.path.abspath(shard), os.path.join(links, f'{i}.parquet'))
            plain = os.path.join(links, f'{i}.parquet')
        files.setdefault(split.group() if split else 'rows', []).append(plain)
    return files


def open_tables(name, args, shards=None, cache_dir=None, required=True):
    """Return a Table for each split that datasets.load_dataset finds. Raises UserError.

    Without a column of pictures there is none, which is an error if one is required.
    """
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as e:  # missing, or its pyarrow and the installed NumPy do not fit each other
        raise UserError(f'cannot import datasets ({e}): install versions that match, or use picture files') from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    files = by_split(shards, tempfile.mkdtemp(dir=cache_dir)) if shards else {}
    if shards and not files:
        if required:
            raise UserError(f'no rows in {shards[0]}: name another file')
        return []
    try:
        config = None if shards else args.config
        splits = datasets.load_dataset(name, config, data_files=files or None, cache_dir=cache_dir)
    except Exception as e:  # the network, the Hub, a damaged file: all come from below with their own classes
        names = []
        if 'config' in str(e).lower() and not shards:
            with contextlib.suppress(Exception):
                names = datasets.get_dataset_config_names(name)
        if names:
            raise UserError(f'{name}: choose one of its configurations, --config ' + ', '.join(names)) from None
        hint = 'check the name and the network, or try --source synthetic'
        if cache_dir:
            hint = 'files of other columns, or that are damaged, have to go elsewhere'
        what = ', '.join(shards[:2]) + ', ...' * (len(shards) > 2) if shards else name
        raise UserError(f'cannot load {what} ({extras.brief(e.__cause__ or e)}): {hint}') from None
    splits = {split: splits[split] for split in sorted(splits) if len(splits[split])}
    column = args.column or choose_column(splits, name if not shards else shards[0])
    there = sorted({c for rows in splits.values() for c in rows.column_names})
    if column and column not in there:
        raise UserError(f"--column={column}: there is {', '.join(there)}")
    if not column and required:
        hint = '; what is behind addresses has to be fetched first' if 'url' in str(there).lower() else ''
        raise UserError(f'no column of images among {there}: a column has to hold image files, or pixels{hint}')
    return [Table(split, rows, column) for split, rows in splits.items() if column in rows.column_names]


def some_rows(rows):
    """Return a few rows of a datasets.Dataset, from its first to its last, as Arrow table."""
    return rows.with_format('arrow')[np.unique(np.linspace(0, len(rows) - 1, 8).astype(int)).tolist()]


def choose_column(splits, name):
    """Return the column of pictures, None if there is none.

    It is the first one with at least half as many colours as any other, so that no mask is taken.
    """
    import datasets
    colours = {}
    for rows in splits.values():
        for column, cells in zip(rows.column_names, some_rows(rows).columns):
            for item in (item for cell in cells.to_pylist() for item in items(cell)):
                with contextlib.suppress(Exception):  # reading what is no picture can raise nearly anything
                    tokens = extras.pack_rgb(extras.load_rgb(to_picture(item), 32))
                    colours[column] = colours.get(column, 0) + len(np.unique(tokens))
            if isinstance(rows.features[column], datasets.Image):
                colours.setdefault(column, 0)  # perhaps all damaged: to be named
    taken = next((column for column in colours if colours[column] >= max(colours.values()) / 2), None)
    if len(colours) > 1:
        others = ' or '.join(column for column in colours if column != taken)
        print(f'{name}: the pictures of the column {taken}; for others  --column {others}')
    return taken

# -----------------------------------------------------------------------------
# from pictures to tokens

def locate(sources, i):
    """Return the source of picture i of all, and its number there."""
    for source in sources:
        if i < len(source):
            return source, i
        i -= len(source)


def read(sources, size, indices):
    """Read a few pictures in a worker. Return [(index, tokens as bytes, None) or (index, None, name and error)]."""
    rows = []
    for i in indices:
        source, k = locate(sources, i)
        try:
            rows.append((i, extras.pack_rgb(extras.load_rgb(source.picture(k), size)).astype('<u2').tobytes(), None))
        except Exception as e:  # a damaged file can raise nearly anything
            rows.append((i, None, f'{source.name(k)} ({type(e).__name__}: {extras.brief(e)})'))
    return rows


def follow_parent(_):
    """End a worker when its parent is killed, instead of waiting for ever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()

# -----------------------------------------------------------------------------
# training and validation images

def split_order(keys, val_fraction, held_out=None):
    """Split images by keys (n,) uint64, equal for equal images. Return (train, val) indices in the order of the keys.

    The keys are hashes of pixels and seed: an order as good as random that depends neither on names nor on the machine.
    Equal images are neighbours in it, and the cut between the two sides moves until it separates none of them.
    If held_out, (n,) bool, names the validation images, images equal to one of them are on neither side.
    """
    order = np.argsort(keys, kind='stable')
    ranked = keys[order]
    if held_out is not None:
        train, val = order[~np.isin(ranked, keys[held_out])], order[held_out[order]]
        if not len(train) or not len(val):
            where = 'in --source that is not in --val_source too' if len(val) else 'in --val_source'
            raise UserError(f'no usable image {where}')
        return train, val
    cuts = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1  # where the next image is another one
    if not len(cuts):
        raise UserError('all usable images are the same picture: training and validation need at least two different '
                        'ones')
    cut = cuts[np.abs(cuts - len(keys) * val_fraction).argmin()]
    return order[cut:], order[:cut]

# -----------------------------------------------------------------------------
# writing

def write_dataset(sources, val_sources, args, staging):
    """Read every picture with all workers; write train.bin, val.bin, meta.pkl, preview.png into staging.

    Memory stays constant: rows go to a scratch file as they come, in the order of the sources, and are copied from
    there in the order of the split; only a key of 64 bits is kept of each. Returns (meta, what could not be read and
    why, (lowest, highest) token).
    """
    total, val_total = sum(map(len, sources)), sum(map(len, val_sources))
    picked = np.arange(total)
    if 0 < args.num_images < total:
        picked = np.sort(np.random.default_rng(args.seed).permutation(total)[:args.num_images])
        print(f'{args.num_images:,} of {total:,} images, picked at random by --seed')
    picked = [*picked.tolist(), *range(total, total + val_total)]
    width, height = args.size
    row = 2 * width * height  # bytes of one image
    loader = DataLoader(picked, batch_size=16, collate_fn=functools.partial(read, [*sources, *val_sources], args.size),
                        num_workers=min(args.workers, len(picked)), worker_init_fn=follow_parent)
    keys, held_out, skipped = bytearray(), bytearray(), []
    with open(os.path.join(staging, 'rows'), 'w+b') as rows:
        with tqdm(total=len(picked), unit='image', desc='reading') as bar:
            for batch in loader:
                for i, tokens, unreadable in batch:
                    if tokens is None:
                        skipped.append(unreadable)
                    else:
                        rows.write(tokens)
                        keys += hashlib.blake2b(tokens, digest_size=8, salt=args.seed.to_bytes(8, 'little')).digest()
                        held_out.append(i >= total)
                bar.update(len(batch))
        named = extras.quote(*args.source) if len(args.source) > 1 else args.source[0]
        if not keys:
            why = f'{len(skipped)} could not be read, e.g. {skipped[0]}' if skipped else 'it holds no pictures'
            raise UserError(f'no usable image in {named}: {why}')
        meta = dict(vocab_size=extras.VOCAB_SIZE, height=height, width=width, tokens_per_image=width * height,
                    bits_per_channel=4, order='raster', source=named)
        low, high = extras.VOCAB_SIZE, 0
        orders = split_order(np.frombuffer(keys, '<u8'), args.val_fraction,
                             np.frombuffer(held_out, bool) if val_sources else None)
        for split, order in zip(('train', 'val'), orders):
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
    first = extras.load_tokens(staging, 'train', meta)[:64].reshape(-1, height, width)
    preview = extras.sheet([extras.to_image(tokens) for tokens in first])
    extras.save_picture(preview, os.path.join(staging, 'preview.png'))
    equal = len(held_out) - meta['train_images'] - meta['val_images']
    if equal:
        print(f'{equal:,} images of --source are in --val_source too: they are not trained on')
    return meta, skipped, (low, high)


def publish(staging, out_dir):
    """Move the finished files into out_dir.

    meta.pkl is removed first and comes last, so that no mixture of old and new files ever loads.
    """
    if hasattr(signal, 'pthread_sigmask'):  # not even Ctrl-C comes between, which would leave neither
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    extras.remove(os.path.join(out_dir, 'meta.pkl'))
    for name in ('train.bin', 'val.bin', 'preview.png', 'meta.pkl'):
        os.replace(os.path.join(staging, name), os.path.join(out_dir, name))
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

# -----------------------------------------------------------------------------
# the command

def image_size(text):
    """Return (width, height) of '64' or '96x64'."""
    numbers = re.fullmatch(r'(\d+)(?:x(\d+))?', text.lower())
    size = tuple(int(n or numbers[1]) for n in numbers.groups()) if numbers else (0, 0)
    if not 2 <= min(size) <= max(size) <= 1024:
        raise argparse.ArgumentTypeError(f'{text}: write one number for squares, or width x height as in 96x64, '
                                         'from 2 to 1024')
    return size


def main(argv=None):
    parser = extras.Parser(description='Turn pictures into 12-bit colour tokens.')
    parser.add_argument('--source', nargs='+', default=['ferrariedhgs/Nature-Landscape'],
                        help='one or more of: a Hub id, a folder of pictures or one that prepare.py has made, files '
                             '(pictures, parquet), synthetic')
    parser.add_argument('--val_source', nargs='+', default=[],
                        help='the validation images: as --source, or the name of a split of it')
    parser.add_argument('--column', help='the column of pictures in a table (chosen by what is in it)')
    parser.add_argument('--config', help='the configuration of a Hub data set that has several')
    parser.add_argument('--out_dir', default=os.path.join(extras.ROOT, 'data', 'landscape'),
                        help='where train.bin, val.bin, meta.pkl and preview.png go')
    parser.add_argument('--size', type=image_size, default=(64, 64),
                        help='width x height in pixels, as in 96x64, or one number for squares (64)')
    parser.add_argument('--val_fraction', type=float, default=0.1,
                        help='share of the images kept for validation, without --val_source')
    parser.add_argument('--seed', type=int, default=1337,
                        help='decides the split and the order, and the synthetic landscapes')
    parser.add_argument('--num_images', type=int, default=0,
                        help='use this many images of --source, picked at random (0: all; 10,000 if synthetic)')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1,
                        help='processes that decode; the result does not depend on it')
    args = parser.parse_args(argv)
    extras.check_values(
        args, val_fraction=('between 0 and 1', 0 < args.val_fraction < 1),
        seed=('from 0 to 2 ** 63 - 1', 0 <= args.seed < 2 ** 63), num_images=('0 or more', args.num_images >= 0),
        workers=('0 or more', args.workers >= 0))
    lock = extras.lock(args.out_dir)  # noqa: F841, held until main returns
    with extras.room_in(args.out_dir):
        staging = os.path.join(args.out_dir, '.partial')
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        os.mkdir(staging)
        try:
            meta, skipped, (low, high) = write_dataset(*open_all(args, staging), args, staging)
            publish(staging, args.out_dir)
        except RuntimeError as e:  # of the DataLoader: the system has killed a worker
            raise UserError(f'{extras.brief(e)}: if memory ran out, try --workers 1') from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    for name in skipped:
        print(f'skipped {name}')
    print(f"{meta['train_images'] + meta['val_images']:,} images of {meta['width']}x{meta['height']}: "
          f"{meta['train_images']:,} for training, {meta['val_images']:,} for validation; {len(skipped):,} unreadable "
          'ones skipped')
    print(f"tokens from 0x{low:03x} to 0x{high:03x} of 0x000 to 0xfff, {meta['tokens_per_image']:,} an image")
    print(f"wrote train.bin, val.bin, meta.pkl to {args.out_dir}; look at {os.path.join(args.out_dir, 'preview.png')}")

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
    """Return value noise at x, y (h, w), from 0 up: summed octaves, about 0..1, octave o in cells of 2**-o."""
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
NOON, HAZY_DAY, MORNING, SUNSET, DUSK, OVERCAST, NIGHT = range(len(HOURS))
# meadow, dry grass, sand, snow, heather: far and near
GROUNDS = [([120, 160, 62], [56, 104, 40]), ([164, 170, 78], [96, 112, 44]), ([206, 184, 112], [140, 108, 56]),
           ([232, 238, 246], [176, 194, 220]), ([150, 110, 128], [92, 66, 84])]
WOODS = [[34, 70, 44], [48, 84, 40], [28, 58, 56], [128, 76, 34], [150, 106, 40]]  # spruce, beech, pine, autumn


def draw_landscape(rng, size):
    """Draw a landscape by the random numbers of rng, (size, size, 3) uint8: sky above, land (and often a lake) below.

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
    sun_x, sun_y = uniform(0.08, 0.92), horizon * (uniform(0.75, 1.0) if hour in (SUNSET, DUSK) else
                                                        uniform(0.15, 0.6))
    radius = uniform(0.025, 0.06)
    disc = lambda cx, cy: smoothstep((radius * radius - (x - cx) * (x - cx) - (y - cy) * (y - cy)) * s / radius)
    glow = 1.0 / (1.0 + ((x - sun_x) * (x - sun_x) + (y - sun_y) * (y - sun_y)) * uniform(20.0, 90.0))
    if hour == NIGHT:
        for star in rng.random((48, 3)):
            picture[int(star[0] * horizon * s), int(star[1] * s)] += 200.0 * star[2]
        moon = disc(sun_x, sun_y) * (1.0 - disc(sun_x + radius * uniform(0.3, 1.2), sun_y - 0.3 * radius))
        picture = mix(picture, np.array([236.0, 234.0, 214.0]), np.maximum(moon, 0.25 * glow * glow)[..., None])
    elif hour != OVERCAST:  # through which there is no sun
        warm = np.array([255.0, 240.0, 200.0]) if hour < SUNSET else np.array([255.0, 206.0, 130.0])
        picture = mix(picture, warm, np.maximum(disc(sun_x, sun_y), 0.55 * glow)[..., None])

    # clouds, flatter and thinner towards the horizon
    cover = uniform(0.30, 0.75) if hour != OVERCAST else uniform(0.2, 0.4)
    billows = noise(rng, y * uniform(3.0, 7.0), x * uniform(1.5, 3.0))
    density = smoothstep((billows - cover) * 4.0) * smoothstep((horizon - y) * 5.0)
    lit = mix(haze, np.full(3, 255.0), uniform(0.2, 0.7)) * np.maximum(light, 0.3)
    clouds = mix(lit, 0.72 * lit, smoothstep((billows - cover - 0.1) * 4.0)[..., None])
    picture = mix(picture, clouds, 0.9 * density[..., None])

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
        snow = np.array([240.0, 244.0, 252.0]) * light * np.clip(bright + 0.15, 0.6, 1.1)[..., None]
        body = mix(body, snow, white[..., None])
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
        deep = mix(zenith, np.array([20.0, 60.0, 80.0]), 0.5) * np.maximum(light, 0.3)
        mirror = mix(picture[source_y, source_x], deep, 0.25 + 0.35 * away[..., None])
        mirror = mirror * (0.9 + 0.3 * ripple)[..., None]
        picture = np.where(((y > water) & (y < bank))[..., None], mirror, picture)

    picture = np.clip(picture, 0.0, 255.0).astype(np.uint16).reshape(size, 2, size, 2, 3)
    total = picture[:, 0, :, 0] + picture[:, 0, :, 1] + picture[:, 1, :, 0] + picture[:, 1, :, 1]
    return ((total + 2) >> 2).astype(np.uint8)


if __name__ == '__main__':
    extras.run(main)

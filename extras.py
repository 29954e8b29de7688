"""What prepare.py, train.py and sample.py share.

In this order: errors, colours, saving pictures, data sets, checkpoints, config files, devices, writing files, and, the
longest, reading any picture.
"""
import argparse
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import glob
import importlib.util
import io
import math
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import threading
import typing
import uuid
import warnings

import filelock
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageFile, PngImagePlugin

from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.abspath(__file__))
VOCAB_SIZE = 4096  # 16 levels of red x 16 of green x 16 of blue, whatever colours a data set holds

# -----------------------------------------------------------------------------
# mistakes of the user: one line, never a traceback

def brief(e, length=160):
    """Return an exception as one short line, without the colours of a terminal."""
    return ' '.join(re.sub(r'\x1b\[[0-9;]*m', '', str(e)).split())[:length] or type(e).__name__


class UserError(Exception):
    """An error that the user can fix; the message says how."""


def quote(*words):
    """Return words as one types them after a prompt, between quotation marks where need be."""
    return subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)


def run(main):
    """Call main() as a command: a mistake prints one line and exits with 1, Ctrl-C exits with 130."""
    sys.stdout.reconfigure(errors='replace')  # names of files may hold what a terminal cannot show
    keep_freed_memory()
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
    except (MemoryError, RuntimeError) as e:  # torch's own are RuntimeErrors
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and 'allocate memory' not in str(e):
            raise
        sys.exit('error: out of memory: for train.py use more --gradient_accumulation_steps or a smaller '
                 '--eval_batch_size; for sample.py free some, or use --device=cpu')
    except OSError as e:  # no such folder, no permission, disk full
        sys.exit(f'error: {e.strerror or e}' + (f': {e.filename}' if e.filename else ''))
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Let glibc reuse freed memory instead of returning it to the system: 4 to 7 % of a training step on a CPU."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD, in bytes: the heap never shrinks
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, its maximum: up to 32 MB come from the heap

# -----------------------------------------------------------------------------
# colours <-> tokens

def pack_rgb(rgb):
    """Pack colours (..., 3) uint8 into tokens (...) uint16, rrrrggggbbbb: the upper four bits of each channel."""
    r, g, b = np.moveaxis(np.asarray(rgb).astype(np.uint16) >> 4, -1, 0)  # widen first: in NumPy 2 uint8(255) << 8 is 0
    return r << 8 | g << 4 | b


def unpack_rgb(tokens):
    """Unpack tokens (...) into colours (..., 3) uint8. Level l of 0..15 is shown as l * 17, so that 15 is white."""
    tokens = np.asarray(tokens).astype(np.uint16)
    return (np.stack([tokens >> 8, tokens >> 4, tokens], axis=-1) & 15).astype(np.uint8) * np.uint8(17)


def parse_pixel(text):
    """Return the token of three hex digits (FEC, 0xFEC) or of a web colour (#f0e0c0, skyblue). Raises UserError."""
    digits = text.lower().removeprefix('0x')
    if len(digits) == 3 and all(c in '0123456789abcdef' for c in digits):
        return int(digits, 16)
    whole = re.sub(r'(\d)\.\d+', r'\1', text)  # some versions of Gradio pick rgba(49.8, 105.9, 134.6, 1)
    try:
        return int(pack_rgb(np.minimum(ImageColor.getrgb(whole)[:3], 255)))  # Pillow lets rgb(300, 0, 0) pass
    except ValueError:
        raise UserError(f"{text!r} is no colour: give three hex digits (FEC) or a web colour ('#f0e0c0')") from None

# -----------------------------------------------------------------------------
# saving pictures

def to_image(tokens, scale=1):
    """Make a PIL image of tokens (h, w), an array or a tensor, with every pixel enlarged to scale x scale."""
    tokens = tokens.cpu().numpy() if torch.is_tensor(tokens) else tokens
    image = Image.fromarray(unpack_rgb(tokens))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def sheet(images, columns=None):
    """Lay out PIL images of one size in rows, nearly as a square, and return them as one."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    gap = 2
    w, h = images[0].width + gap, images[0].height + gap
    page = Image.new('RGB', (columns * w + gap, -(-len(images) // columns) * h + gap), 'white')
    for i, image in enumerate(images):
        page.paste(image, (i % columns * w + gap, i // columns * h + gap))
    return page


def picture_format(path):
    """Return Pillow's name of the format that the ending of path names. Raises UserError."""
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder: give the name of a picture')
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if kind not in ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TGA', 'TIFF', 'WEBP'):
        raise UserError(f'cannot tell a picture format from {path}: end the name in .png, .bmp, .gif or .webp')
    return kind


def save_picture(image, path, **options):
    """Save a PIL image, whole or not at all, in the format that the ending of path names."""
    kind = picture_format(path)
    with atomic_write(path) as f:
        try:
            image.save(f, format=kind, **options)
        except (ValueError, OSError, struct.error) as e:
            if getattr(e, 'errno', None):  # of the disk, not of the format
                raise
            raise UserError(f'{path} cannot be written ({brief(e)}): make it smaller, or a .png') from None


def save_bmp(tokens, path, scale=1):
    """Save tokens (h, w) as a picture, in the format of the ending (the name is the ancestor's)."""
    save_picture(to_image(tokens, scale), path)

# -----------------------------------------------------------------------------
# data sets

class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # the only door by which a pickle can run code
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def load_meta(data_dir):
    """Read meta.pkl of a prepared data set into a dict of plain values. Raises UserError."""
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        raise UserError(f'no data set in {data_dir}: make one with  '
                        f'python prepare.py --out_dir {quote(data_dir)}')
    try:
        with open(path, 'rb') as f:
            meta = _PlainUnpickler(f).load()
        images = min(meta['train_images'], meta['val_images'])
        if meta['tokens_per_image'] != meta['height'] * meta['width'] or images < 1:
            raise ValueError('its numbers make no data set')
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f'{path} is damaged or no plain dictionary ({type(e).__name__}: {e}): '
                        'prepare the data again') from None
    if meta.get('vocab_size') != VOCAB_SIZE:
        raise UserError(f"{path} speaks of {meta.get('vocab_size')} colours, this program of {VOCAB_SIZE}: "
                        'prepare the data again')
    return meta


def load_tokens(data_dir, split, meta):
    """Map {split}.bin into memory, (images, tokens_per_image) uint16, one image a row. Raises UserError."""
    path, row = os.path.join(data_dir, split + '.bin'), 2 * meta['tokens_per_image']
    if not os.path.exists(path):
        raise UserError(f'{path} is missing: prepare the data again')
    size, images = os.path.getsize(path), meta[f'{split}_images']
    if size != images * row:
        raise UserError(f'{path} holds {size:,} bytes, not {images:,} whole images of {row:,} bytes as meta.pkl says: '
                        'it was cut short or belongs to another data set; prepare the data again')
    return np.memmap(path, dtype='<u2', mode='r').reshape(images, -1)

# -----------------------------------------------------------------------------
# checkpoints

def save_checkpoint(checkpoint, path):
    """Save a dict of tensors and plain values, whole or not at all."""
    with atomic_write(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # what torch makes of a write that fails
            raise e.__context__ if isinstance(e.__context__, OSError) else e


def checkpoint_heads(folder):
    """Return {path: dict(iter_num, run or None)} of all readable checkpoints ckpt*.pt, without reading tensors."""
    heads = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'ckpt*.pt'))):
        with contextlib.suppress(Exception):  # a damaged file can raise nearly anything
            checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
            heads[path] = dict(iter_num=checkpoint.get('iter_num', 0), run=checkpoint.get('run'))
    return heads


def load_checkpoint(path, device='cpu'):
    """Load a checkpoint of this repository or of nanoGPT into a dict; nothing in it can run code. Raises UserError."""
    if not os.path.isfile(path):
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        there = sorted(glob.glob(os.path.join(glob.escape(folder), '*.pt')))
        instead = f"there is {', '.join(there)}" if there else 'train one with  python train.py config/landscape.py'
        raise UserError(f'no checkpoint {path}: {instead}')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        weights = checkpoint['model']
        # a compiled model of nanoGPT puts this before every name
        weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in weights.items()}
        # the mask that old versions of it keep beside the weights
        checkpoint['model'] = {name: tensor for name, tensor in weights.items() if not name.endswith('.attn.bias')}
        args = checkpoint['model_args']
        args.setdefault('start_embedding', False)  # nanoGPT knows of none, and does not say so
        tokens = args['block_size'] + (not args['start_embedding'])
        side = int(tokens ** 0.5)  # nor a shape: its pictures are square
        checkpoint.setdefault('height', tokens // args['width'] if 'width' in args else side)
        checkpoint.setdefault('width', args.get('width', side))
        args.setdefault('width', checkpoint['width'])
        checkpoint.setdefault('temperature', checkpoint.get('config', {}).get('temperature', 1.0))
    except Exception as e:
        raise UserError(f'{path} is no readable checkpoint ({brief(e, 100)}): it may be half written or hold more than '
                        'tensors and plain values; use another one') from None
    if args.get('vocab_size') != VOCAB_SIZE:
        raise UserError(f"{path} has a vocabulary of {args.get('vocab_size')}, not of {VOCAB_SIZE} colours: "
                        'it is not a model of pictures')
    if checkpoint['height'] * checkpoint['width'] != tokens:
        raise UserError(f'{path} paints {tokens} pixels, which make no picture: is it a model of text?')
    return checkpoint


@contextlib.contextmanager
def fitting(path):
    """Turn what fails because the checkpoint at path does not fit the model into a UserError."""
    try:
        yield
    except Exception as e:
        raise UserError(f'{path} does not fit the model of model.py ({brief(e)}): '
                        'use the version of the code that made it') from None


def build_model(checkpoint, path, device):
    """Build the model of a dict of load_checkpoint on device, ready to paint. Raises UserError."""
    with fitting(path):
        model = GPT(GPTConfig(**checkpoint['model_args']))
        model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()

# -----------------------------------------------------------------------------
# configuration: a dataclass declares the keys, files of assignments and --key=value override them

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and suggest the nearest option."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f'{message} (--help lists everything)')

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(_unknown(unknown[0].split('=')[0], known))
        for name, value in vars(args).items():
            if isinstance(value, str):  # the shell leaves the ~ of --out_dir=~/runs alone
                setattr(args, name, os.path.expanduser(value))
            elif isinstance(value, list):
                setattr(args, name, [os.path.expanduser(v) for v in value])
        return args


# keys of nanoGPT, or of other programs, that have no counterpart of a similar name here
ELSEWHERE = {
    'block_size': 'it is given by the data: their images decide it', 'vocab_size': 'it is always 4096 colours',
    'lr_decay_iters': 'the rate decays until max_iters', 'dataset': 'name the folder with data_dir',
    'eval_iters': 'every validation image counts', 'eval_only': 'bench/quality.py measures a checkpoint',
    'always_save_checkpoint': 'every evaluation saves one', 'bias': 'there are none in the blocks',
    'decay_lr': 'for a constant rate, make min_lr equal to learning_rate'}


def _unknown(name, known, where=''):
    if name.lstrip('-') in ELSEWHERE:
        return f"unknown key {name}{where}: {ELSEWHERE[name.lstrip('-')]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown key {name}{where}" + (f': did you mean {near[0]}?' if near else ': --help lists all keys')


def check_values(args, **rules):
    """Check attributes of args by rules: name=(what it has to be, whether it is that). Raises UserError."""
    for name, (what, holds) in rules.items():
        if not holds:
            raise UserError(f'--{name}={getattr(args, name)}: it has to be {what}')


RANGES = {'more than 0': lambda value: value > 0, '0 or more': lambda value: value >= 0,
          '0 or more and less than 1': lambda value: 0 <= value < 1,
          'from 0 to 2 ** 63 - 1': lambda value: 0 <= value < 2 ** 63}


def key(default, help, within=None):
    """Declare a field of a config dataclass: its default, its line in --help, and its range, one of RANGES."""
    return dataclasses.field(default=default, metadata={'help': help, 'range': within})


def load_config(cls, argv=None, description=None):
    """Build cls from its defaults, then config files in order, then --key=value. Raises UserError.

    Keys that end in _dir are meant from the repository in defaults and config files, so that a command does the same
    from wherever it is called; what is typed is meant from the current folder.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = Parser(description=description)
    parser.add_argument('config', nargs='*', help='config files: plain assignments such as  batch_size = 8')
    for f in fields.values():
        parser.add_argument(f'--{f.name}', default=argparse.SUPPRESS, metavar=_kind(f.type),
                            help=f"{f.metadata['help']} (default: {f.default!r})")
    typed = vars(parser.parse_args(argv))

    values = {name: f.default for name, f in fields.items()}
    for path in typed.pop('config'):
        values.update(read_config(path, fields))
    values = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in values.items()}
    if os.getcwd() != ROOT:
        values.update({name: os.path.join(ROOT, value) for name, value in values.items() if name.endswith('_dir')})
    for name, text in typed.items():
        values[name] = _coerce(_parse(text, fields[name].type), fields[name].type, f'--{name}')
    config, ranges = cls(**values), {name: f.metadata['range'] for name, f in fields.items()}
    check_values(config, **{name: (within, RANGES[within](values[name])) for name, within in ranges.items() if within})
    return config


def read_config(path, fields):
    """Read a config file into a dict. Raises UserError.

    It is parsed, never run: literals, arithmetic, and names assigned above.
    """
    path = path if os.path.exists(path) else os.path.join(ROOT, path)
    if not os.path.isfile(path):
        there = ', '.join(sorted(glob.glob('config/*.py', root_dir=ROOT)))
        raise UserError(f'no config file {path}: there is {there}; overrides are written --key=value')
    values = {}
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows may put a mark in front
            lines = ast.parse(f.read()).body
    except (SyntaxError, ValueError) as e:  # UnicodeDecodeError is a ValueError
        raise UserError(f'{path} is no config file: {e}') from None
    for line in lines:
        where = f', line {line.lineno} of {path}'
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a docstring
        targets = []
        if isinstance(line, ast.Assign):
            targets = line.targets
        elif isinstance(line, ast.AnnAssign) and line.value:
            targets = [line.target]
        if not targets or not all(isinstance(target, ast.Name) for target in targets) or not _is_plain(line.value):
            raise UserError(f'a config file holds only assignments such as  batch_size = 8{where}')
        for name in (target.id for target in targets):
            if name not in fields:
                raise UserError(_unknown(name, list(fields), where))
            try:
                scope = {'__builtins__': {}, 'int': int, 'float': float}
                value = eval(compile(ast.Expression(line.value), path, 'eval'), scope, values)
            except Exception as e:
                raise UserError(f'{e}{where}') from None
            values[name] = _coerce(value, fields[name].type, name + where)
    return values


def _is_plain(expression):
    """Return whether an expression holds nothing but literals, names, arithmetic, int() and float()."""
    allowed = (ast.Constant, ast.Name, ast.Load, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.Call,
               ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd)
    for node in ast.walk(expression):
        if not isinstance(node, allowed):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in ('int', 'float')):
            return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small(node.right):
            return False
    return True


def _is_small(exponent):
    """Return whether an exponent is a number up to 64, so that nobody waits for 9 ** 9 ** 9."""
    if isinstance(exponent, ast.UnaryOp):
        return _is_small(exponent.operand)
    return isinstance(exponent, ast.Constant) and isinstance(exponent.value, (int, float)) and exponent.value <= 64


def _kind(kind):
    return ' or '.join(k.__name__ for k in typing.get_args(kind) or (kind,))


def _parse(text, kind):
    """Return the value that was typed; text that is none of its kind is left to _coerce."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _coerce(value, kind, where):
    """Return value as kind, a type or union of types: also from int to float, from list to tuple. Raises UserError."""
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) in (int, list):
        value = (value,) if type(value) is int else tuple(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f'{where} has to be a finite number, not {value}')
    fits = type(value) in (typing.get_args(kind) or (kind,))
    if not fits or kind is tuple and not all(type(v) is int for v in value):
        raise UserError(f"{where} takes {_kind(kind)}{' of whole numbers' if kind is tuple else ''}, not {value!r}")
    return value

# -----------------------------------------------------------------------------
# devices

def pick_device(name='auto'):
    """Choose a device that is really there by auto, cuda, cuda:1, mps or cpu. Raises UserError."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name.split(':')[0] in ('cuda', 'mps', 'cpu'):
        with contextlib.suppress(RuntimeError, AssertionError):  # a torch without CUDA raises AssertionError
            torch.empty(1, device=name)
            if name.startswith('cuda:'):
                torch.cuda.set_device(name)  # streams and graphs go to the current one
            return name
    raise UserError(f'device {name!r} is not available on this machine: use --device=auto or --device=cpu')


def pick_dtype(name, device):
    """Choose the torch dtype for autocast on device by auto or a name. Raises UserError."""
    cuda = device.startswith('cuda')
    if name == 'auto':
        if cuda:  # is_bf16_supported() also says yes to cards that only emulate it: ask for Ampere or later
            name = 'bfloat16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'float16'
        else:  # a CPU without instructions for bfloat16 is ten times slower in it
            known = any(getattr(torch.cpu, f'_is_{feature}_supported', lambda: False)()
                        for feature in ('amx_tile', 'avx512_bf16'))
            name = 'bfloat16' if device == 'cpu' and known else 'float32'
    if name not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'--dtype={name}: choose auto, float32, bfloat16 or float16')
    if (name == 'float16' and not cuda) or (name == 'bfloat16' and device.startswith('mps')):
        raise UserError(f'--dtype={name} does not work on {device}: use --dtype=auto')
    return getattr(torch, name)


def pick_compile(setting, device):
    """Return whether to compile by True, False or auto: on CUDA, if Triton is installed and knows the card."""
    if setting not in (True, False, 'auto'):
        raise UserError(f'--compile={setting}: choose True, False or auto')
    if setting != 'auto':
        return setting
    has_triton = importlib.util.find_spec('triton') is not None
    return device.startswith('cuda') and has_triton and torch.cuda.get_device_capability(device) >= (7, 0)

# -----------------------------------------------------------------------------
# writing files: whole or not at all

def make_folder(path):
    """Create a folder if need be and make sure that it can be written to, before hours of work depend on it."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f'cannot write to the folder {path} ({e.strerror}): choose another one') from None


def lock(folder):
    """Create a folder if need be and lock it as long as the returned object lives. Raises UserError if another did."""
    make_folder(folder)
    held = filelock.FileLock(os.path.join(folder, '.lock'))
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f'another process is writing to {folder}: wait for it, or choose another --out_dir') from None
    except (NotImplementedError, OSError):  # some network disks know no locks
        pass
    return held


@contextlib.contextmanager
def room_in(folder):
    """Turn a full disk within this context into a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f'no room in {folder} ({e.strerror}): free some; what was there before is unharmed') from None


@contextlib.contextmanager
def atomic_write(path):
    """Open a binary file that gets its name once it is complete and on the disk. Raises UserError if it is full."""
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    partial = f'{path}.{uuid.uuid4().hex[:8]}.partial'  # two processes that write one path do not meet
    try:
        with room_in(folder), open(partial, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def remove(path):
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)

# -----------------------------------------------------------------------------
# reading any picture

# EXIF orientation -> what puts the stored picture upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # those that swap width and height

# what Pillow can open but should not: data, videos and documents; for some of them it would start another program
NO_PICTURES = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF'}
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 24, 2 ** 28  # bytes: some hold long texts


def is_picture(path):
    """Return whether a file is a picture: by its ending if that says so, else by its content."""
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if kind in Image.OPEN:
        return kind not in NO_PICTURES
    try:
        with _quiet(), _open(path):
            return True
    except Exception:  # what is no picture can raise nearly anything
        return False


def load_rgb(file, size):
    """Read a picture: a path, a binary stream or a PIL image -> (height, width, 3) uint8, upright, centre-cropped.

    size is (width, height), or one number for a square; scaled by LANCZOS. Takes any Pillow mode: alpha is laid over
    white, more than 8 bits are scaled to 8, an animation gives its first frame; grey, CMYK and wide-gamut colours go
    to sRGB by the profile in the file. Damaged metadata is ignored. Raises whatever Pillow raises if the pixels cannot
    be read.
    """
    width, height = (size, size) if isinstance(size, int) else size
    with _quiet(), _open(file) as image:
        # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which leaves at least 4 pixels for one of ours
        total, wanted = image.width * image.height, 4 * max(width, height)
        draft = image.draft(None, (wanted, wanted))
        # even so, a progressive JPEG is kept in full, in half of the memory
        pixels = max(image.width * image.height, total // 2 if image.info.get('progressive') else 0)
        if pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f'{total:,} pixels would not fit into the memory')
        image.load()
        turn = _turn(image)  # read after load(), which turns a TIFF and takes this away
        if turn in SIDEWAYS:
            width, height = height, width
        w, h = draft[1][2:] if draft else image.size  # the exact size: that of a draft is rounded up
        crop_w, crop_h = min(w, h * width / height), min(h, w * height / width)
        left, top = (w - crop_w) / 2, (h - crop_h) / 2
        box = left, top, left + crop_w, top + crop_h
        cropped = _flatten(image).resize((width, height), Image.Resampling.LANCZOS, box=box)
        cropped = cropped if turn is None else cropped.transpose(turn)
        return np.asarray(_to_srgb(cropped, image.info.get('icc_profile')))


_ONE_THREAD = threading.Lock()


@contextlib.contextmanager
def _quiet():
    """Suppress warnings about odd pictures: Pillow's, and those that libtiff writes to file descriptor 2."""
    with _ONE_THREAD:  # both are those of the whole process
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(nowhere)


def _open(file):
    """Open a picture: nothing but pictures, JPEGs of any size, PNGs with damaged chunks beside their pixels."""
    if isinstance(file, Image.Image):
        return file
    Image.init()
    limit = Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # while the header is read; pixels have to be complete
    try:
        return Image.open(file, formats=[kind for kind in Image.ID if kind not in NO_PICTURES])
    except Image.DecompressionBombError:
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file, formats=['JPEG'])
        except Image.UnidentifiedImageError:
            pass
        raise
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, False


def _turn(image):
    """Return the Image.Transpose that puts an image upright, or None if there is none or its EXIF is damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF can raise nearly anything
        return None


def _flatten(image):
    """Convert any Pillow mode to L, RGB or CMYK (or LAB, ...), 8 bits a channel and opaque."""
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        values = np.asarray(image, dtype=np.float64)
        levels = to_levels(values)
        levels[values == image.info.get('transparency', np.nan)] = 255
        return Image.fromarray(levels)
    if image.has_transparency_data:
        grey, image = image.mode in ('L', 'LA', 'La'), image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('L' if grey else 'RGB')
    return image.convert('RGB') if image.mode in ('1', 'P') else image


def to_levels(values):
    """Scale whole numbers of up to 32 bits, or floats, to uint8. No file states which value is white: it is guessed.

    Whole numbers fill 8, 10, 12, 14 or 16 bits, the fewest that hold them all. Floats go up to 1 or 255 (a few
    highlights may be above); otherwise the brightest is white. NaN and infinity do not count. Raises ValueError if
    nothing else is there.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError('no pixel is a number')
    most, highest = np.percentile(finite, 99.9), finite.max()
    if (finite == finite.round()).all() and highest > 1:
        white = next((2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2 ** bits), highest)
    else:
        white = 1 if most <= 1 else 255 if 16 < most <= 255 else most
    return (np.nan_to_num(values, posinf=np.inf, neginf=0) / white * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _to_srgb(image, profile):
    """Follow an embedded ICC profile to sRGB; without one, or with a broken one, Pillow's plain conversion."""
    if profile and image.mode in ('L', 'RGB', 'CMYK'):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert('RGB')

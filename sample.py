"""Paint pictures with a trained model.

    python sample.py --ckpt out/ckpt6000.pt                                # 16 landscapes, each from a first pixel of its own
    python sample.py --ckpt out/ckpt6000.pt --first_pixel FEC --seed 7     # all from a pale yellow one
    python sample.py --ckpt out/ckpt6000.pt --image photo.png --rows 32    # finish a picture from its upper half
    python sample.py --ckpt out/ckpt6000.pt --num_samples 4 --gif --scale 4   # and watch it being painted
"""
import itertools
import os

import numpy as np
import torch
from tqdm import tqdm

import extras
from extras import UserError
from model import images_at_once


GREY = 0x666  # of what is not painted yet


def read_picture(path, size):
    """The picture at path -> its tokens (height * width,); size is (width, height). Raises UserError."""
    try:
        return extras.pack_rgb(extras.load_rgb(path, size)).reshape(-1).astype(np.int64)
    except FileNotFoundError:
        raise UserError(f'no picture {path}') from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f'{path} cannot be read as a picture ({extras.brief(e)})') from None


def first_pixel(text, model):
    """--first_pixel -> prompt (T,), empty if the model is to draw the first pixel itself. Raises UserError."""
    starts = model.config.start_embedding
    text = text or ('sample' if starts else 'FEC')
    if text != 'sample':
        return np.array([extras.parse_pixel(text)])
    if not starts:
        raise UserError('this model has no start embedding and cannot draw the first pixel: give one, as in --first_pixel FEC')
    return np.zeros(0, np.int64)


def paint(model, prompt, args):
    """Paint args.num_samples images from one prompt (T,), one after the other: tokens (tokens_per_image,)."""
    generator, batch = torch.Generator().manual_seed(args.seed), images_at_once(model)
    with tqdm(total=args.num_samples * (model.config.tokens_per_image - len(prompt)), unit='px', unit_scale=True, desc='painting') as bar:
        alone = 0 if model.lm_head.weight.is_cuda else 1  # on a CPU one picture is there in seconds, the others are faster side by side
        for begin, end in itertools.pairwise(sorted({0, *range(alone, args.num_samples, batch), args.num_samples})):
            yield from model.generate(np.tile(prompt, (end - begin, 1)), temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                      generator=generator, progress=bar.update).cpu().numpy()


def page(images, pixels, shape, scale, whole=None):
    """Images, each (tokens_per_image,), with only so many of their first pixels, the rest grey -> a sheet as PIL image.

    A completion is shown in one row, between its context and the whole original (tokens, with their number in context).
    """
    standing = np.arange(len(images[0]))
    shown = [np.where(standing < pixels, image, GREY) for image in images]
    if whole is not None:
        original, context = whole
        shown = [np.where(standing < context, original, GREY), *shown, original]
    return extras.sheet([extras.to_image(tokens.reshape(shape), scale) for tokens in shown], len(shown) if whole is not None else None)


def main(argv=None):
    parser = extras.Parser(description='Paint pictures with a trained model.')
    parser.add_argument('--ckpt', required=True, help='checkpoint of train.py, as in out/ckpt6000.pt')
    parser.add_argument('--first_pixel', help="three hex digits (FEC), a web colour ('#f0e0c0'), or sample: drawn by the model (the default if it can)")
    parser.add_argument('--num_samples', type=int, default=16, help='how many pictures (16)')
    parser.add_argument('--temperature', type=float, default=1.0, help='below 1: calmer, above: wilder, 0: always the likeliest colour (1.0)')
    parser.add_argument('--top_k', type=int, help='draw from the k likeliest colours only')
    parser.add_argument('--top_p', type=float, help='draw from the likeliest colours that together have this probability')
    parser.add_argument('--seed', type=int, default=1337, help='the same seed, the same pictures (1337)')
    parser.add_argument('--image', help='complete this picture ...')
    parser.add_argument('--rows', type=int, help='... from so many of its upper rows (half of them)')
    parser.add_argument('--out', default=os.path.join(extras.ROOT, 'out', 'images', 'sample.png'), help='the sheet; single pictures get _0, _1, ... (out/images/sample.png)')
    parser.add_argument('--scale', type=int, default=1, help='enlarge every pixel to a square of this side (1)')
    parser.add_argument('--gif', action='store_true', help='also write the painting in progress, a frame a row')
    parser.add_argument('--device', default='auto', help='auto, cuda, cuda:1, mps or cpu (auto)')
    args = parser.parse_args(argv)
    extras.check_values(args, num_samples=('1 or more', args.num_samples > 0),
                        temperature=('0 or more', args.temperature >= 0), top_k=('1 or more', args.top_k is None or args.top_k > 0),
                        top_p=('more than 0, up to 1', args.top_p is None or 0 < args.top_p <= 1), scale=('from 1 to 64', 1 <= args.scale <= 64),
                        seed=('from 0 to 2 ** 63 - 1', 0 <= args.seed < 2 ** 63))
    if args.rows is not None and args.image is None:
        raise UserError('--rows says how much of a picture to keep: name the picture with --image')
    if args.image and args.first_pixel:
        raise UserError('--image brings its first pixel along: leave out --first_pixel')
    stem, ending = os.path.splitext(args.out)
    extras.picture_format(args.out)
    if args.gif and ending.lower() == '.gif':
        raise UserError(f'--gif writes {stem}.gif: end the name of the sheet, --out, in .png')
    extras.make_folder(os.path.dirname(args.out) or '.')

    device = extras.pick_device(args.device)
    checkpoint = extras.load_checkpoint(args.ckpt, device)
    model = extras.build_model(checkpoint, args.ckpt, device)
    shape = height, width = checkpoint['height'], checkpoint['width']
    if args.image:
        rows = height // 2 if args.rows is None else args.rows
        extras.check_values(args, rows=(f'from 1 to {height - 1}: how many of the {height} rows to keep', 0 < rows < height))
        original = read_picture(args.image, (width, height))
        prompt = original[:rows * width]
        whole = original, len(prompt)
    else:
        prompt, whole = first_pixel(args.first_pixel, model), None

    images = []
    for i, tokens in enumerate(paint(model, prompt, args)):
        path = args.out if args.num_samples == 1 and not whole else f'{stem}_{i}{ending}'
        extras.save_bmp(tokens.reshape(shape), path, args.scale)
        images.append(tokens)
        if i == 0:
            tqdm.write(f'wrote {path}')
    if path != args.out:
        extras.save_picture(page(images, height * width, shape, args.scale, whole), args.out)
        print(f'wrote {path}, the last of {len(images)}, and {args.out}')
    if args.gif:
        frames = [page(images, pixels, shape, args.scale, whole) for pixels in (*range(len(prompt), height * width, width), height * width)]
        extras.save_picture(frames[0], stem + '.gif', save_all=True, append_images=frames[1:], duration=[60] * (len(frames) - 1) + [2000], loop=0)
        print(f'wrote {stem}.gif')


if __name__ == '__main__':
    extras.run(main)

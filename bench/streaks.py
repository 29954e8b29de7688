"""Do samples vary across and down as photographs do? Streaks are the first thing that people see.

    python bench/streaks.py --ckpt out/ckpt6000.pt --data data/photos

Anisotropy (|dx| - |dy|) / (|dx| + |dy|) of the luminance, -1 for perfect horizontal streaks, and how often a token equals the one to its left
and the one above: of samples, of all validation images, and of random sets of as many of these, which says how much is chance.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402


def row(name, tokens):
    y = np.stack((tokens >> 8, tokens >> 4 & 15, tokens & 15), axis=-1) @ [0.299, 0.587, 0.114]  # (n, H, W)
    dx, dy = np.abs(np.diff(y, axis=2)).mean(), np.abs(np.diff(y, axis=1)).mean()
    left, above = (tokens[:, :, 1:] == tokens[:, :, :-1]).mean(), (tokens[:, 1:] == tokens[:, :-1]).mean()
    print(f'| {name} | {len(tokens)} | {(dx - dy) / (dx + dy):.3f} | {left:.3f} | {above:.3f} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', required=True)
    parser.add_argument('--data', default='data/photos')
    parser.add_argument('--num_samples', type=int, default=256)
    args = parser.parse_args()
    device = extras.pick_device('auto')
    model = extras.build_model(extras.load_checkpoint(args.ckpt, device), args.ckpt, device)
    meta = extras.load_meta(args.data)
    shape = (-1, meta['height'], meta['width'])
    real = extras.load_tokens(args.data, 'val', meta).astype(np.int64).reshape(shape)
    prompts = np.zeros((args.num_samples, 0)) if model.config.start_embedding else real[:args.num_samples, :1, 0]
    with tqdm(total=args.num_samples * meta['tokens_per_image'], unit='px', unit_scale=True, leave=False) as bar:
        samples = model.generate(prompts, generator=torch.Generator().manual_seed(1), progress=bar.update).cpu().numpy().reshape(shape)
    print('| images | number | anisotropy | equal to the left | equal to the one above |\n|---|---|---|---|---|')
    row('samples, temperature 1', samples)
    row('validation images', real)
    for seed in range(3):
        row('some of them', np.random.default_rng(seed).permutation(real)[:args.num_samples])


if __name__ == '__main__':
    main()

"""Painting several pixels a pass, exactly: does it pay? (It does not; see bench/README.md.)

    python bench/jacobi.py --ckpt out/ckpt6000.pt

Every pixel has its noise, so that what the model draws there is a function of the pixels before it. A pass takes the next pixel
and W - 1 guesses of those that follow, and draws all of them; draws stand as far as the guesses before them were right (Jacobi
iteration, Song et al. 2020, arXiv 2002.03629). The rest become the next guesses; new ones copy the pixel to the left, or the one above.
The image is that of GPT.generate, which is checked; W = 1 is one pixel a pass, by the same code.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402
from model import Decoder, choose, cpu_settings, exponential_noise, logits_to_probs  # noqa: E402


def decode_tokens(decoder, tokens, pos):
    """Decoder.decode_one_token for W pixels (W,) of one image from position pos on -> logits (W, V)."""
    W, nh, end = len(tokens), decoder.n_head, pos + len(tokens)
    x = F.embedding(tokens, decoder.wte) + decoder.wpe[pos:end]
    future = torch.full((W, W), -torch.inf).triu(1)
    for (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), keys, values in zip(decoder.blocks, decoder.keys, decoder.values):
        q, k, v = c_attn(ln_1(x)).view(W, 3, nh, -1).permute(1, 2, 0, 3)  # each (nh, W, hs)
        keys[:, :, pos:end], values[:, pos:end] = k.mT, v
        scores = torch.bmm(q, keys[:, :, :end])
        scores[:, :, pos:] += future
        y = torch.bmm(scores.softmax(-1), values[:, :end]).transpose(0, 1).reshape(W, -1)
        x = x + attn_proj(y)
        x = x + mlp_proj(F.gelu(c_fc(ln_2(x))))
    return decoder.head(decoder.ln_f(x))


def paint(model, first, noise, window, back):
    """-> tokens (N,) of an image from its first pixel, and the number of passes. back: how far away the pixel that is copied lies."""
    N = model.config.tokens_per_image
    image, decoder = torch.zeros(N, dtype=torch.long), Decoder(model, 1)
    image[0] = first
    decoder.prefill(image[None, :1])
    stands, known, passes = 1, 1, 0  # pixels that stand; that and the guesses
    while stands < N:
        end = min(stands - 1 + window, N - 1)  # the pass reads image[stands - 1:end]
        for i in range(known, end):
            image[i] = image[max(i - back, 0)]
        logits = decode_tokens(decoder, image[stands - 1:end], decoder.position(stands - 1))
        drawn = choose(logits_to_probs(logits), noise[stands:end + 1])
        right = (drawn[:-1] == image[stands:end]).long().cumprod(0).sum().item()
        image[stands:end + 1] = drawn
        stands, known, passes = stands + right + 1, end + 1, passes + 1
    return image, passes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', required=True)
    args = parser.parse_args()
    checkpoint = extras.load_checkpoint(args.ckpt, 'cpu')
    model = extras.build_model(checkpoint, args.ckpt, 'cpu')
    model.generate([[0xFEC]], 40)  # libraries set themselves up
    seed = torch.randint(2 ** 62, (1,), generator=torch.Generator().manual_seed(0))
    expected = model.generate([[0xFEC]], generator=torch.Generator().manual_seed(0))[0]
    noise = torch.cat([exponential_noise(seed, i, 64, 4096) for i in range(0, len(expected), 64)])[:, 0]  # (N, V)
    print('| guess | W | pixels a pass | ms a pass | s an image | differing pixels |\n|---|---|---|---|---|---|')
    for guess, back in (('left', 1), ('above', checkpoint['width'])):
        for window in (1, 2, 4, 8, 16):
            with torch.inference_mode(), cpu_settings(window):
                began = time.perf_counter()
                image, passes = paint(model, 0xFEC, noise, window, back)
                seconds = time.perf_counter() - began
            print(f'| {guess} | {window} | {len(image) / passes:.2f} | {1e3 * seconds / passes:.2f} | {seconds:.2f} | {(image != expected).sum()} |', flush=True)


if __name__ == '__main__':
    main()

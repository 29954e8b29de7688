"""Painting several pixels a pass, exactly: would it pay?

    python bench/jacobi.py --ckpt out/ckpt6000.pt

Every pixel has its noise, so that what the model draws there is a function of the pixels before it. A pass takes the next pixel
and W - 1 guesses of those that follow, and draws all of them; draws stand as far as the guesses before them were right (Jacobi
iteration, Song et al. 2020, arXiv 2002.03629). The rest become the next guesses; new ones copy the pixel to the left, or the one above.

The passes are counted on the middle quarter of an image, and the result is checked against it. What a pass costs is not measured with
a decoder for many pixels, which would have to be written, but with W images at once, which read the same weights once.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import extras  # noqa: E402
from model import Decoder, choose, cpu_settings, exponential_noise, logits_to_probs  # noqa: E402


@torch.inference_mode()
def count_passes(model, image, seed, begin, end, window, back):
    """Pixels begin .. end - 1 of an image (1, N) again from those before them -> passes. back: how far away the pixel that is copied lies."""
    guess = image.clone()
    guess[:, begin:] = 0
    noise = exponential_noise(seed, begin, end - begin, model.config.vocab_size)[:, 0]  # (end - begin, V)
    stands = known = begin  # pixels that stand; those and the guesses
    passes = 0
    while stands < end:
        last = min(stands + window, end)
        for i in range(known, last):
            guess[0, i] = guess[0, i - back]
        x, weight = model.features(guess[:, :last])
        drawn = choose(logits_to_probs(x[0, stands:] @ weight.t()), noise[stands - begin:last - begin])
        right = (drawn[:-1] == guess[0, stands:last - 1]).long().cumprod(0).sum().item()
        guess[0, stands:last] = drawn
        stands, known, passes = stands + right + 1, last, passes + 1
    assert guess[:, :end].equal(image[:, :end]), 'not the image that it should be'
    return passes


@torch.inference_mode()
def milliseconds(model, batch, steps=300):
    """What a step of the sampler takes with so many images."""
    with cpu_settings(batch):
        decoder, tokens = Decoder(model, batch), torch.zeros(batch, dtype=torch.long)
        decoder.prefill(tokens[:, None])
        for i in range(2, 2 + steps):
            if i == 52:
                began = time.perf_counter()
            decoder.decode_one_token(tokens, i)
    return 1e3 * (time.perf_counter() - began) / (steps - 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', required=True)
    args = parser.parse_args()
    model = extras.build_model(extras.load_checkpoint(args.ckpt, 'cpu'), args.ckpt, 'cpu')
    image = model.generate([[0xFEC]], generator=torch.Generator().manual_seed(0))
    seed = torch.randint(2 ** 62, (1,), generator=torch.Generator().manual_seed(0))
    begin, end = image.size(1) * 3 // 8, image.size(1) * 5 // 8
    one = milliseconds(model, 1)
    print('| guess | W | pixels a pass | ms a pass, at least | times faster, at most |\n|---|---|---|---|---|')
    for guess, back in (('left', 1), ('above', model.config.width)):
        for window in (2, 4, 8):
            pixels = (end - begin) / count_passes(model, image, seed, begin, end, window, back)
            cost = milliseconds(model, window)
            print(f'| {guess} | {window} | {pixels:.2f} | {cost:.2f} | {pixels * one / cost:.2f} |', flush=True)


if __name__ == '__main__':
    main()

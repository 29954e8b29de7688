"""Train the pixel GPT's rival, a small diffusion model of 1.8M parameters, on a budget of images, and paint with it.

    pip install -r bench/requirements.txt
    python bench/diffusion.py unet --data data/photos                  # two hours, and painting
    python bench/diffusion.py dit --data data/photos --images 30000
    python bench/quality.py --samples out/diffusion/unet/*/samples_50_stop0.1.npy --ckpt out/landscape/ckpt6000.pt

A rectified flow (Liu et al. 2022, arXiv 2209.03003): between an image, at time 0, and noise, at time 1, the network
learns the velocity noise - image, and painting follows it back. Times are logit-normal (Esser et al. 2024, arXiv
2403.03206), their quantiles spread evenly over a batch. The networks are those of diffusers: a UNet much as in DDPM,
and DiT with patches of 4x4; so is the solver of second order, UniPC (Zhao et al. 2023, arXiv 2302.04867). Muon and
AdamW, a cosine schedule, averaged weights and mirrored images, as in train.py.

Four learning rates of Muon get a quarter of the budget each; the best by the loss on validation images gets all of it.
The budget is what an hour of two cores with AVX512-BF16 holds (the pixel GPT: 12,000 images), on any machine.
The images are the same tokens, each level the middle of its sixteenth of the range, into which samples fall back. What
has been interrupted goes on where it was; --seed another number for a second run.
"""
import copy
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from common import ROOT, argument_parser
import extras
from model import Muon
from train import update_average

WARMUP, SAVE_EVERY = 100, 60  # iterations, seconds
HOUR = dict(unet=104_000, dit=166_000)  # images in an hour of two cores with AVX512-BF16


def unet(shape):
    """Return diffusers' UNet, with attention at a quarter and an eighth of the resolution."""
    from diffusers import UNet2DModel
    model = UNet2DModel(
        sample_size=shape, block_out_channels=(32, 48, 64, 80), layers_per_block=1, norm_num_groups=8,
        down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
        attention_head_dim=16, attn_norm_num_groups=8, resnet_time_scale_shift='scale_shift')
    start_at_zero(model, ('conv2', 'to_out.0', 'conv_out'))
    return model


def dit(shape):
    """Return diffusers' DiT for images of one class; as in the paper its blocks share the embedding of the time."""
    from diffusers import DiTTransformer2DModel
    model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=32, num_layers=6, in_channels=3,
                                  sample_size=shape[0], patch_size=4, num_embeds_ada_norm=1)
    first, *others = model.transformer_blocks
    first.norm1.emb.class_embedder.dropout_prob = 0.0  # the class is never left out
    for block in others:
        block.norm1.emb = first.norm1.emb
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    start_at_zero(model, ('norm1.linear', 'proj_out_1', 'proj_out_2'))
    return model


def start_at_zero(model, names):
    """Zero the layers so named, as DDPM and DiT do and diffusers does not: every block begins as the identity."""
    for name, module in model.named_modules():
        if name.endswith(names):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def to_images(tokens):
    """Tokens (B, H, W) -> images (B, 3, H, W) from -1 to 1: the middle of each level's sixteenth."""
    levels = torch.stack((tokens >> 8, tokens >> 4 & 15, tokens & 15), dim=1)
    return (levels + 0.5) / 8 - 1


def to_tokens(images):
    """Images (B, 3, H, W) -> tokens (B, H, W)."""
    red, green, blue = ((images + 1) * 8).floor().clamp(0, 15).int().unbind(1)
    return red << 8 | green << 4 | blue


def velocity(model, x, t):
    """Predict the velocity of images x (B, 3, H, W) at times t (B,), which diffusers counts from 0 to 1,000."""
    extra = {} if type(model).__name__ == 'UNet2DModel' else {'class_labels': torch.zeros_like(t, dtype=torch.long)}
    dtype = extras.pick_dtype('auto', x.device.type)
    with torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
        return model(x, 1000 * t, return_dict=False, **extra)[0].float()


def draw_times(uniform, mean, std):
    """Uniform numbers (B,) from 0 to 1 -> times (B,), the sigmoid of a normal distribution's quantiles."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def flow_loss(model, images, t, noise):
    """Return the mean squared error of the velocity of images (B, 3, H, W) at times t (B,), between them and noise."""
    at = t[:, None, None, None]
    return F.mse_loss(velocity(model, (1 - at) * images + at * noise, t), noise - images)


@torch.no_grad()
def validation_loss(model, tokens, device, batch=32):
    """Return the loss on all images of tokens (n, H, W), with the same noise and times for every model.

    The times are spread evenly from 0.05 to 1. Before that the noise is less than half a level, and what a network
    can learn is to round.
    """
    generator, total = torch.Generator().manual_seed(0), 0.0
    model.eval()
    times = torch.linspace(0.05, 1, len(tokens))[torch.randperm(len(tokens), generator=generator)]
    for part, t in zip(tokens.split(batch), times.split(batch)):
        images = to_images(part)
        noise = torch.randn(images.shape, generator=generator)
        total += flow_loss(model, images.to(device), t.to(device), noise.to(device)).item() * len(part)
    return total / len(tokens)


def configure_optimizers(model, lr, muon_lr):
    """Return [AdamW] for a network, or with muon_lr [AdamW, Muon], which gets the weights between first and last layer.

    A convolution's weight (out, in, 3, 3) is a matrix (out, 9 in) for it: a view, since it is stored channels last.
    """
    as_matrix = lambda weight: weight.permute(0, *range(2, weight.dim()), 1).flatten(1)
    ends = ('conv_in', 'conv_out', 'time_embedding', 'pos_embed', 'proj_out')
    rest, matrices = [], []
    for name, p in model.named_parameters():
        if not muon_lr or p.dim() == 1 or name.startswith(ends) or 'embedder' in name:
            rest.append(p)
            continue
        # autograd fills the gradient of p; Muon steps this view of p, which gets the same view of that gradient
        matrix = torch.nn.Parameter(as_matrix(p.detach()))
        p.register_post_accumulate_grad_hook(lambda p, matrix=matrix: setattr(matrix, 'grad', as_matrix(p.grad)))
        matrices.append(matrix)
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    return [adamw, Muon(matrices, muon_lr, weight_decay=0.0)] if matrices else [adamw]


def train(args, muon_lr, images, train_tokens, val_tokens, device):
    """Train a network on so many images, or go on with it, and return its averaged weights' loss and the model."""
    iterations = images // args.batch_size
    mean, std = args.times
    name = (f'{Path(args.data).resolve().name}_seed{args.seed}_batch{args.batch_size}_lr{args.lr:g}_muon{muon_lr:g}_'
            f'times{mean:g}_{std:g}_{images}images')
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / 'ckpt.pt')
    torch.manual_seed(args.seed)
    model = NETWORKS[args.network](tuple(train_tokens.shape[1:])).to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(model)
    optimizers = configure_optimizers(model, args.lr, muon_lr)
    state = dict(iteration=0, seconds=0.0, loss=None)
    generator = torch.Generator(device).manual_seed(args.seed)
    if os.path.exists(path):
        saved = torch.load(path, map_location='cpu', weights_only=True)
        state = saved['state']
        generator.set_state(saved['generator'])
        model.load_state_dict(saved['model'])
        averaged.load_state_dict(saved['averaged'])
        for optimizer, saved_optimizer in zip(optimizers, saved['optimizers']):
            optimizer.load_state_dict(saved_optimizer)
    if device.startswith('cuda'):
        model.compile()
        train_tokens = train_tokens.to(device)

    def save():
        extras.save_checkpoint(dict(model=model.state_dict(), averaged=averaged.state_dict(), state=state,
                                    optimizers=[optimizer.state_dict() for optimizer in optimizers],
                                    generator=generator.get_state()), path)

    saved_at = began = time.monotonic()
    with tqdm(total=images, initial=state['iteration'] * args.batch_size, unit='image', desc=name) as bar:
        while state['iteration'] < iterations:
            model.train()
            progress = state['iteration'] / iterations
            scale = min((state['iteration'] + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * progress))
            for optimizer, peak in zip(optimizers, (args.lr, muon_lr)):
                optimizer.param_groups[0]['lr'] = peak * scale
            draw = dict(generator=generator, device=device)
            tokens = train_tokens[torch.randint(len(train_tokens), (args.batch_size,), **draw)]
            mirrored = torch.rand(len(tokens), **draw) < 0.5
            x = to_images(torch.where(mirrored[:, None, None], tokens.flip(2), tokens))
            # one time from each of as many parts of the distribution as there are images
            uniform = (torch.randperm(len(x), **draw) + torch.rand(len(x), **draw)) / len(x)
            t = draw_times(uniform.clamp(1e-6, 1 - 1e-6), mean, std)
            loss = flow_loss(model, x, t, torch.randn(x.shape, **draw))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            state['iteration'] += 1
            update_average(averaged, model, state['iteration'], mean_age=0.1)
            now = time.monotonic()
            state['seconds'] += now - began
            bar.update(args.batch_size)
            if state['iteration'] % 50 == 0:
                bar.set_postfix(loss=f'{loss.item():.4f}', refresh=False)
            if now - saved_at > SAVE_EVERY:
                save()
                saved_at = now = time.monotonic()
            began = now
    if state['loss'] is None:
        state['loss'] = validation_loss(averaged, val_tokens, device)
        save()
    print(f"{name}: validation loss {state['loss']:.5f} after {state['seconds'] / 60:.1f} min", flush=True)
    return state['loss'], averaged.eval(), folder


@torch.inference_mode()
def paint(model, path, count, steps, stop, shape, device, seed):
    """Save the tokens (count, H, W) of images painted in so many steps, or go on with those at path.

    From the first step at or before the time stop on, the prediction is taken as it is: there is nothing left to
    learn but rounding, and small steps add grain.
    """
    from diffusers import UniPCMultistepScheduler
    batch = 250 if device.startswith('cuda') else 16  # 16 stay in a processor's cache
    done = np.load(path) if path.exists() else np.empty((0, *shape), np.uint16)
    began, before = time.monotonic(), len(done)
    for begin in tqdm(range(before, count, batch), desc=f'painting in {steps} steps', unit=f' {batch} images'):
        # steps are closer together where there is more noise: with too large ones contrast of large areas is lost
        scheduler = UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=1.5)
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator().manual_seed(1_000_000 * seed + begin)
        x = torch.randn(min(batch, count - begin), 3, *shape, generator=generator).to(device)
        for step, t in zip(scheduler.timesteps, scheduler.sigmas):
            direction = velocity(model, x, t.to(device).expand(len(x)))
            if t <= stop:
                x = x - t * direction
                break
            x = scheduler.step(direction, step, x).prev_sample
        done = np.concatenate((done, to_tokens(x).cpu().numpy().astype(np.uint16)))
        with extras.atomic_write(path) as f:
            np.save(f, done)
    if len(done) > before:
        print(f'{path}: {(time.monotonic() - began) / (len(done) - before):.2f} s an image', flush=True)


NETWORKS = dict(unet=unet, dit=dit)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('network', choices=NETWORKS)
    parser.add_argument('--data', default='data/photos')
    parser.add_argument('--images', type=int, help=f'to train on, the budget: {HOUR}')
    parser.add_argument('--muon_lr', type=float, nargs='+', default=[0.005, 0.01, 0.02, 0.04],
                        help='for hidden layers, with Muon, tried for a quarter of it each (0: AdamW for all)')
    parser.add_argument('--lr', type=float, default=6e-3, help='for the others, with AdamW')
    parser.add_argument('--times', type=float, nargs=2, default=[0.0, 1.4], metavar=('MEAN', 'STD'),
                        help='of the logit-normal distribution of times')
    parser.add_argument('--batch_size', type=int, default=16, help='images an iteration')
    parser.add_argument('--num_samples', type=int, default=1000)
    parser.add_argument('--steps', type=int, nargs='+', default=[50, 250], help='of painting')
    parser.add_argument('--stop', type=float, default=0.1, help='time of its last step')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--out', type=Path, help='out/diffusion/<network>')
    args = parser.parse_args()
    args.images = args.images or HOUR[args.network]
    args.out = args.out or ROOT / 'out' / 'diffusion' / args.network
    device = extras.pick_device('auto')
    meta = extras.load_meta(args.data)
    shape = meta['height'], meta['width']
    train_tokens, val_tokens = (torch.from_numpy(extras.load_tokens(args.data, split, meta).astype(np.int64))
                                .view(-1, *shape) for split in ('train', 'val'))
    data = train_tokens, val_tokens, device
    print(f'{sum(p.numel() for p in NETWORKS[args.network](shape).parameters()):,} parameters')
    rates = args.muon_lr if len(args.muon_lr) > 1 else []
    losses = {rate: train(args, rate, args.images // 4, *data)[0] for rate in rates}
    best = min(losses, key=losses.get, default=args.muon_lr[0])
    if losses and best in (min(losses), max(losses)):
        print(f'{best:g} is the best of these learning rates, and the last of them: try a few beyond it', flush=True)
    _, model, folder = train(args, best, args.images, *data)
    for steps in args.steps:
        path = folder / f'samples_{steps}_stop{args.stop:g}.npy'
        paint(model, path, args.num_samples, steps, args.stop, shape, device, args.seed)


if __name__ == '__main__':
    extras.run(main)

"""bench/diffusion.py: its arithmetic, and a few steps of both networks."""
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Script, call
from helpers import load, same

sys.path.append(str(ROOT / 'bench'))
import diffusion  # noqa: E402

needs_diffusers = pytest.mark.skipif(not find_spec('diffusers'), reason='pip install -r bench/requirements.txt')


def test_images_fall_back_into_their_tokens():
    tokens = torch.arange(4096).view(1, 64, 64)
    images = diffusion.to_images(tokens)
    assert images.shape == (1, 3, 64, 64) and images.min() == -images.max() == -15 / 16
    for noise in (-0.06, 0, 0.06):  # half a sixteenth is 0.0625
        assert (diffusion.to_tokens(images + noise) == tokens).all()
    assert (diffusion.to_tokens(torch.tensor([-9.0, 9.0]).expand(1, 3, 1, 2)) == torch.tensor([0, 4095])).all()


@needs_diffusers
def test_the_true_velocity_costs_nothing_and_leads_from_noise_to_the_image(tmp_path, monkeypatch):
    image = diffusion.to_images(torch.arange(0, 4096, 16).view(1, 16, 16))
    # x = (1 - t) image + t noise, so that (x - image) / t is noise - image
    monkeypatch.setattr(diffusion, 'velocity', lambda model, x, t: (x - image) / t[:, None, None, None])
    noise, t = torch.randn(5, 3, 16, 16), torch.rand(5)
    assert diffusion.flow_loss(None, image.expand(5, -1, -1, -1), t, noise) < 1e-6
    np.save(tmp_path / 'a.npy', np.zeros((1, 16, 16), np.uint16))  # painted earlier, and kept
    diffusion.paint(None, tmp_path / 'a.npy', 3, 7, 0.15, (16, 16), 'cpu', seed=1)
    painted = np.load(tmp_path / 'a.npy')
    assert (painted[0] == 0).all() and (painted[1:] == np.arange(0, 4096, 16).reshape(16, 16)).all()
    assert len(painted) == 3


@needs_diffusers
@pytest.mark.parametrize('stop, below', [(0.15, 1), (0, 5)])
def test_painting_stops_early_and_takes_the_prediction(tmp_path, monkeypatch, stop, below):
    image, times = diffusion.to_images(torch.arange(0, 4096, 16).view(1, 16, 16)), []

    def velocity(model, x, t):
        times.append(t[0].item())
        return (x - image) / t[:, None, None, None]

    monkeypatch.setattr(diffusion, 'velocity', velocity)
    diffusion.paint(None, tmp_path / 'a.npy', 2, 50, stop, (16, 16), 'cpu', seed=1)
    assert times == sorted(times, reverse=True) and sum(t <= 0.15 for t in times) == below
    assert (np.load(tmp_path / 'a.npy') == np.arange(0, 4096, 16).reshape(16, 16)).all()


@needs_diffusers
def test_painting_keeps_the_contrast_of_the_whole_image(tmp_path, monkeypatch):
    """Images of one colour each, of standard deviation 0.3: the noise tells it from a time near 1 on."""
    first = []

    def velocity(model, x, t):
        first.append(x)
        t = t[:, None, None, None]
        colour = x.mean((2, 3), keepdim=True)
        variance = t ** 2 / 4096  # of the noise, averaged over 64 x 64 pixels
        return (t / 4096 - (1 - t) * 0.09) / ((1 - t) ** 2 * 0.09 + variance) * colour + (x - colour) / t

    monkeypatch.setattr(diffusion, 'velocity', velocity)
    diffusion.paint(None, tmp_path / 'a.npy', 16, 50, 0.15, (64, 64), 'cpu', seed=1)
    painted = diffusion.to_images(torch.from_numpy(np.load(tmp_path / 'a.npy').astype(np.int64)))
    assert (painted == painted[:, :, :1, :1]).all()
    true = (0.3 * 64 * first[0].mean((2, 3))).clamp(-1, 1)
    assert 0.94 < (painted[:, :, 0, 0] * true).mean() / (true * true).mean() < 1.03  # 0.8 with Euler's steps


def test_times_are_quantiles_of_a_logit_normal_distribution():
    times = diffusion.draw_times(torch.tensor([0.1587, 0.5, 0.8413]), -0.5, 2.0)
    assert torch.allclose(torch.logit(times), torch.tensor([-2.5, -0.5, 1.5]), atol=1e-3)


@needs_diffusers
@pytest.mark.parametrize('network, name', [('unet', 'down_blocks.1.resnets.0.conv1.weight'),  # (48, 32, 3, 3)
                                           ('dit', 'transformer_blocks.2.ff.net.2.weight')])  # (128, 512)
def test_muon_moves_a_hidden_layer_as_far_in_every_direction_and_adamw_the_ends(network, name):
    torch.manual_seed(0)
    model = diffusion.NETWORKS[network]((16, 16)).to(memory_format=torch.channels_last)
    for p in model.parameters():  # no zeros: every layer gets a gradient
        torch.nn.init.normal_(p, std=0.1)
    before = {key: p.clone() for key, p in model.named_parameters()}
    adamw, muon = diffusion.configure_optimizers(model, 1e-3, 0.02)
    images = torch.randn(16, 3, 16, 16)
    diffusion.flow_loss(model, images, torch.rand(16), torch.randn_like(images)).backward()
    muon.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    update = (before[name] - dict(model.named_parameters())[name]).flatten(1)
    singular = torch.linalg.svdvals(update) / 0.02  # 0.7 to 1.2, but where the gradient is all but zero
    assert singular[0] < 1.25 and (singular > 0.6).float().mean() > 0.8
    adamw.step()
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} > moved
    for end in ('conv_in', 'conv_out') if network == 'unet' else ('pos_embed', 'proj_out_2'):
        assert not any(key.startswith(end) for key in moved)


@needs_diffusers
@pytest.mark.parametrize('network', ['unet', 'dit'])
def test_a_network_trains_at_every_rate_and_on_at_the_best_paints_and_is_measured(network, data, tmp_path):
    out = call('bench/diffusion.py', network, '--data', data, '--batch_size', 4, '--images', 40, '--muon_lr', 0, 0.02,
               '--steps', 3, '--num_samples', 7, '--out', tmp_path)
    assert out.count('validation loss') == 3
    assert 1.71e6 < int(out.split(' parameters')[0].replace(',', '')) < 1.89e6  # as many for images of any size
    state = lambda run: load(run / 'ckpt.pt')['state']
    folder = lambda muon, images: tmp_path / f'synthetic_seed1_batch4_lr0.006_muon{muon}_times0_1.4_{images}images'
    losses = {muon: state(folder(muon, 10))['loss'] for muon in ('0', '0.02')}
    best = folder(min(losses, key=losses.get), 40)
    assert state(best)['iteration'] == 10
    painted = np.load(best / 'samples_3_stop0.1.npy')
    assert painted.shape == (7, 16, 16) and painted.dtype == np.uint16 and painted.max() < 4096
    out = call('bench/quality.py', '--samples', best / 'samples_3_stop0.1.npy', '--data', data, '--num_samples', 8,
               '--out', tmp_path)
    assert 'sliced Wasserstein distance' in out and '7 images in each set' in out


@needs_diffusers
def test_a_training_that_was_killed_comes_out_the_same(data, tmp_path):
    options = ['dit', '--data', data, '--batch_size', 4, '--images', 40, '--muon_lr', 0.02, '--steps', 2,
               '--num_samples', 3]
    call('bench/diffusion.py', *options, '--out', tmp_path / 'whole')
    often = tmp_path / 'often.py'  # the script, but it saves after each iteration
    often.write_text(f'import sys\nsys.path.insert(0, {str(ROOT / "bench")!r})\nimport diffusion, extras\n'
                     'diffusion.SAVE_EVERY = 0\nextras.run(diffusion.main)\n')
    process = Script(often, *options, '--out', tmp_path / 'killed')
    result = Path('synthetic_seed1_batch4_lr0.006_muon0.02_times0_1.4_40images')
    process.wait_for((tmp_path / 'killed' / result / 'ckpt.pt').exists)
    process.send(signal.SIGKILL)
    process.end()
    assert process.code == -signal.SIGKILL and load(tmp_path / 'killed' / result / 'ckpt.pt')['state']['iteration'] < 10
    call('bench/diffusion.py', *options, '--out', tmp_path / 'killed')
    assert same(*(load(tmp_path / run / result / 'ckpt.pt')['averaged'] for run in ('whole', 'killed')))
    whole, killed = (np.load(tmp_path / run / result / 'samples_2_stop0.1.npy') for run in ('whole', 'killed'))
    assert (whole == killed).all()

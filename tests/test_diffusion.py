"""bench/diffusion.py: its arithmetic, and a few steps of both networks."""
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Script, call

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
@pytest.mark.parametrize('network', ['unet', 'dit'])
def test_a_network_has_as_many_parameters_as_the_pixel_gpt(network):
    count = sum(p.numel() for p in diffusion.NETWORKS[network]((64, 64)).parameters())
    assert abs(count / 1.8e6 - 1) < 0.05


@needs_diffusers
def test_the_true_velocity_costs_nothing_and_leads_from_noise_to_the_image(tmp_path, monkeypatch):
    image = diffusion.to_images(torch.arange(0, 4096, 16).view(1, 16, 16))
    # x = (1 - t) image + t noise, so that (x - image) / t is noise - image
    monkeypatch.setattr(diffusion, 'velocity', lambda model, x, t: (x - image) / t[:, None, None, None])
    noise, t = torch.randn(5, 3, 16, 16), torch.rand(5)
    assert diffusion.flow_loss(None, image.expand(5, -1, -1, -1), t, noise) < 1e-6
    np.save(tmp_path / 'a.npy', np.zeros((1, 16, 16), np.uint16))  # painted earlier, and kept
    diffusion.paint(None, tmp_path / 'a.npy', 3, 7, (16, 16), 'cpu', seed=1)
    painted = np.load(tmp_path / 'a.npy')
    assert (painted[0] == 0).all() and (painted[1:] == np.arange(0, 4096, 16).reshape(16, 16)).all()
    assert len(painted) == 3


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
def test_a_network_trains_with_each_learning_rate_and_then_with_the_best_paints_and_is_measured(network, data, tmp_path):
    out = call('bench/diffusion.py', network, '--data', data, '--batch_size', 4, '--images', 40, '--muon_lr', 0, 0.02,
               '--steps', 3, '--num_samples', 7, '--out', tmp_path)
    assert out.count('validation loss') == 3
    state = lambda folder: torch.load(folder / 'ckpt.pt', weights_only=True)['state']
    losses = {muon: state(tmp_path / f'seed1_batch4_lr0.006_muon{muon}_10images')['loss'] for muon in ('0', '0.02')}
    best = tmp_path / f'seed1_batch4_lr0.006_muon{min(losses, key=losses.get)}_40images'
    assert state(best)['iteration'] == 10
    painted = np.load(best / 'samples_3.npy')
    assert painted.shape == (7, 16, 16) and painted.dtype == np.uint16 and painted.max() < 4096
    out = call('bench/quality.py', '--samples', best / 'samples_3.npy', '--data', data, '--num_samples', 8,
               '--out', tmp_path)
    assert 'sliced Wasserstein distance' in out and '7 images in each set' in out


@needs_diffusers
def test_a_training_that_was_killed_comes_out_the_same(data, tmp_path):
    options = ['dit', '--data', data, '--batch_size', 4, '--images', 120, '--muon_lr', 0.02, '--steps', 2,
               '--num_samples', 3]
    call('bench/diffusion.py', *options, '--out', tmp_path / 'whole')
    often = tmp_path / 'often.py'  # the script, but it saves after each iteration
    often.write_text(f'import sys\nsys.path.insert(0, {str(ROOT / "bench")!r})\nimport diffusion, extras\n'
                     'diffusion.SAVE_EVERY = 0\nextras.run(diffusion.main)\n')
    process = Script(often, *options, '--out', tmp_path / 'killed')
    result = Path('seed1_batch4_lr0.006_muon0.02_120images')
    process.wait_for((tmp_path / 'killed' / result / 'ckpt.pt').exists)
    process.send(signal.SIGKILL)
    process.end()
    read = lambda run: torch.load(tmp_path / run / result / 'ckpt.pt', weights_only=True)
    assert process.code == -signal.SIGKILL and read('killed')['state']['iteration'] < 30
    call('bench/diffusion.py', *options, '--out', tmp_path / 'killed')
    for key, weight in read('whole')['averaged'].items():
        assert torch.equal(weight, read('killed')['averaged'][key])
    whole, killed = (np.load(tmp_path / run / result / 'samples_2.npy') for run in ('whole', 'killed'))
    assert (whole == killed).all()

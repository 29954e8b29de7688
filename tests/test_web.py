"""The page of sample.py --web: through Gradio's client, and in a real browser."""
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

import extras
from conftest import ENV, PIPED, ROOT, call, command, heed_signals
from helpers import PHOTOS, needs_photos

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
PAINTING = 'img[src*="file="]'  # the picture on the page
needs_gradio = pytest.mark.skipif(not find_spec('gradio'), reason='no gradio here: pip install gradio')
needs_browser = pytest.mark.skipif(not (CHROMIUM and find_spec('playwright')),
                                   reason='no browser here: apt-get install chromium, pip install playwright')


@contextmanager
def serving(command, cwd):
    """Serve a page from the folder cwd, which has to stay as it is: yields its address and its process."""
    before, scratch = sorted(cwd.iterdir()), cwd.parent / f'scratch_{cwd.name}'
    scratch.mkdir()
    env = {**ENV, 'TMPDIR': str(scratch), 'HOME': str(cwd), 'PYTHONUNBUFFERED': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    process = subprocess.Popen(command, cwd=cwd, **{**PIPED, 'env': env}, preexec_fn=heed_signals)
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if address := re.search(r'http://[\d.]+:\d+', line):
                break
        assert address, ''.join(printed)
        yield address[0], process
        process.send_signal(signal.SIGINT)  # unless the test has ended it
        process.communicate(timeout=15)
        assert process.returncode == 0
    finally:
        process.kill()
    assert sorted(cwd.iterdir()) == before and list(scratch.iterdir()) == []  # nothing stays behind


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


def cells(path, count, columns, side):
    """The tokens of the pictures of a sheet, 16x16 each, enlarged to so many pixels."""
    sheet, pitch, margin = pixels(path), side + 2, 2 * (count > 1)
    corners = [(i // columns * pitch + margin, i % columns * pitch + margin) for i in range(count)]
    return [extras.pack_rgb(sheet[y:y + side:side // 16, x:x + side:side // 16]) for y, x in corners]


@pytest.fixture(scope='module')
def page(trained, tmp_path_factory):
    """A page of the tiny model, whose usual port is taken: its address, its process."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a page before may linger
        try:
            s.bind(('127.0.0.1', 7860))
            s.listen()
        except OSError:
            pass  # taken already
        with serving(command('sample.py', '--ckpt', trained / 'ckpt20.pt', '--web'),
                     tmp_path_factory.mktemp('web')) as served:
            assert not served[0].endswith(':7860') and served[0].startswith('http://127.0.0.1')
            yield served


@pytest.fixture
def client(page):
    from gradio_client import Client
    return Client(page[0], verbose=False)


def settings(trained, seed=1337, count=1, ckpt='ckpt20.pt'):
    """Of the page, and of the command line."""
    return ([count, str(trained / ckpt), seed, 0.9, 200, 0.95],
            ['--ckpt', trained / ckpt, '--num_samples', count, '--seed', seed, '--temperature', 0.9, '--top_k', 200,
             '--top_p', 0.95])


@needs_gradio
@pytest.mark.parametrize('first', ['F85', None])
def test_the_page_paints_what_the_command_paints(client, trained, tmp_path, first):
    web, shell = settings(trained, 7, 4)
    if first:
        picture, line, gif = client.predict(*web, '#ff8855', api_name='/from_pixel')
        shell += ['--first_pixel', first]
    else:
        job = client.submit(*web, api_name='/paint')
        picture, line, gif = job.result()
        lines = [line for _, line, _ in job.outputs()]
        assert lines.count('painting ...') == 1 < len(lines)  # later, it would overwrite what the button Stop says
    call('sample.py', *shell, '--scale', 17, '--gif', '--out', tmp_path / 'a.png')
    assert np.array_equal(pixels(picture), pixels(tmp_path / 'a.png'))
    assert open(gif['value'], 'rb').read() == (tmp_path / 'a.gif').read_bytes()
    assert re.fullmatch(r'1,02[04] pixels in [\d.]+ s, [\d,]+ pixels/s', line)


@needs_gradio
def test_a_picture_that_a_browser_may_be_reading_is_not_written_again(client, trained, tmp_path_factory):
    web, _ = settings(trained, 11)
    first, _, _ = client.predict(*web, api_name='/paint')
    served = [path for path in tmp_path_factory.getbasetemp().glob('scratch_*/*/gradio/*/painting_11.png')
              if path.read_bytes() == open(first, 'rb').read()]
    assert len(served) == 1
    served[0].write_bytes(b'half of it')
    again, _, _ = client.predict(*web, api_name='/paint')
    assert open(again, 'rb').read() == b'half of it'


@needs_gradio
def test_the_page_completes_what_the_command_completes(client, trained, data, tmp_path):
    from gradio_client import handle_file
    original = extras.load_tokens(str(data), 'val', extras.load_meta(str(data)))[0].reshape(16, 16)
    extras.save_bmp(original, tmp_path / 'photo.png')
    upload = handle_file(tmp_path / 'photo.png')
    png, _, _ = client.predict(upload, 5, api_name='/preview')
    kept, before = cells(png, 2, 2, 272)
    assert (kept[:5] == original[:5]).all() and (kept[5:] == 0x666).all() and (before == original).all()
    for count in (4, 1):
        web, shell = settings(trained, count=count)
        png, _, _ = client.predict(*web, upload, 5, api_name='/complete')
        call('sample.py', *shell, '--image', tmp_path / 'photo.png', '--rows', 5, '--out', tmp_path / 'a.png')
        kept, *completed, last = cells(png, count + 2, 3, 176)
        assert (kept[:5] == original[:5]).all() and (kept[5:] == 0x666).all() and (last == original).all()
        for i, tokens in enumerate(completed):
            assert (tokens == extras.pack_rgb(pixels(tmp_path / f'a_{i}.png'))).all()


@needs_gradio
def test_the_same_noise_from_four_first_pixels_and_another_checkpoint(client, trained, tmp_path):
    web, shell = settings(trained, 3, ckpt='ckpt10.pt')
    colours = ['#ffffff', '#000000', '#ff8855', '#88aaff']
    png, _, _ = client.predict(*web, *colours, api_name='/compare')
    for colour, tokens in zip(colours, cells(png, 4, 2, 272)):
        call('sample.py', *shell, '--first_pixel', colour, '--out', tmp_path / 'a.png')
        assert (tokens == extras.pack_rgb(pixels(tmp_path / 'a.png'))).all()


@needs_gradio
def test_two_clients_get_their_own_pictures(page, trained):
    from gradio_client import Client
    checkpoint = extras.load_checkpoint(str(trained / 'ckpt20.pt'))
    model = extras.build_model(checkpoint, '', 'cpu')
    resident = lambda: int(re.search(r'VmRSS:\s+(\d+)', open(f'/proc/{page[1].pid}/status').read())[1]) // 1024  # MB
    wrong, memory = [], []

    def visit(colour):
        client = Client(page[0], verbose=False)
        for seed in range(5):
            web = [1, str(trained / 'ckpt20.pt'), seed, 1, 0, 1]
            png, _, _ = client.predict(*web, colour, api_name='/from_pixel')
            expected = model.generate([[extras.parse_pixel(colour)]], generator=torch.Generator().manual_seed(seed))
            if not (cells(png, 1, 1, 560)[0].flatten() == expected.numpy()[0]).all():
                wrong.append((colour, seed))
            memory.append(resident())

    visitors = [threading.Thread(target=visit, args=[colour]) for colour in ('#ff8855', '#88aaff')]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(120)
    assert not wrong and len(memory) == 10 and memory[-1] - memory[3] < 100


@needs_gradio
def test_mistakes_are_told_on_the_page(client, trained, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError
    (tmp_path / 'photo.jpg').write_text('no picture')
    web, _ = settings(trained)
    for name, inputs in (('/preview', [handle_file(tmp_path / 'photo.jpg'), 5]),
                         ('/complete', [*web, handle_file(tmp_path / 'photo.jpg'), 5])):
        with pytest.raises(AppError, match='^photo.jpg cannot be read as a picture: try another one$'):
            client.predict(*inputs, api_name=name)
    with pytest.raises(AppError, match='the seed has to be a whole number'):
        client.predict(*web[:2], -5, *web[3:], api_name='/paint')
    with pytest.raises(AppError, match="^'' is no colour"):
        client.predict(*web, '', api_name='/from_pixel')
    with pytest.raises(AppError, match='drop in a picture first'):
        client.predict(*web, None, 5, api_name='/complete')
    with pytest.raises(AppError, match='no checkpoint nonsense.pt|not in the list of choices'):
        client.predict(web[0], 'nonsense.pt', *web[2:], api_name='/paint')


@pytest.mark.parametrize('module, line', [
    ('raise ImportError', 'error: --web needs gradio: pip install gradio\n'),
    ("__version__ = '5.50.0'", 'error: --web needs gradio 6, and this is 5.50.0: pip install -U gradio\n')])
def test_without_a_recent_gradio_one_line_says_what_to_install(trained, tmp_path, module, line):
    (tmp_path / 'gradio.py').write_text(module)
    done = subprocess.run(command('sample.py', '--ckpt', trained / 'ckpt20.pt', '--web'), cwd=tmp_path,
                          **{**PIPED, 'env': {**ENV, 'PYTHONPATH': str(tmp_path)}})
    assert done.returncode == 1 and done.stdout == line


@needs_gradio
@needs_browser
def test_in_a_browser(tmp_path):
    """As a Hugging Face Space: the README's app.py in a folder with the files that it names."""
    from playwright.sync_api import expect, sync_playwright
    folder = tmp_path / 'space'
    folder.mkdir()
    for name in ('model.py', 'sample.py', 'extras.py', 'out/ckpt6000.pt'):
        shutil.copy(ROOT / name, folder)
    app = re.search(r'```python\n(import sample\n.*?)```', (ROOT / 'README.md').read_text(), re.S)[1]
    (folder / 'app.py').write_text(app)
    with serving([sys.executable, 'app.py'], folder) as (address, process), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page, elsewhere = browser.new_page(viewport=dict(width=1366, height=768)), []
        page.on('request', lambda request: elsewhere.append(request.url))
        page.goto(address.replace('0.0.0.0', '127.0.0.1'), wait_until='domcontentloaded')
        painting = lambda: page.locator(PAINTING).first.get_attribute('src', timeout=20_000)
        changes = lambda src: expect(page.locator(PAINTING).first).not_to_have_attribute('src', src, timeout=20_000)
        status = lambda text: page.get_by_text(text).wait_for(timeout=60_000)

        # a first pixel, of 12 bits; the picture changes while it is painted
        page.get_by_label('1', exact=True).check()
        page.locator('.dialog-button').first.click()
        page.get_by_role('button', name='HSL').click()  # the far end of an open picker can be reached
        page.get_by_role('button', name='Hex').click()
        page.locator('input[type=text]').first.fill('#123456')
        page.keyboard.press('Enter')
        page.get_by_role('button', name='Paint from this first pixel').click()
        seen = []
        while not page.get_by_text('pixels/s').count() and len(seen) < 10_000:
            seen.append(painting())
        assert len(set(seen)) > 3
        with page.expect_download() as download:
            page.get_by_label('Download').first.click()
        assert extras.pack_rgb(pixels(download.value.path()))[0, 0] == 0x135

        # stop in the middle
        page.get_by_label('9', exact=True).check()
        page.get_by_role('button', name='Paint', exact=True).click()
        status('painting ...')
        before = painting()
        page.get_by_role('button', name='Stop').click()
        status('stopped')
        page.wait_for_timeout(1000)
        stopped = painting()
        page.wait_for_timeout(1000)
        assert painting() == stopped and page.get_by_text('stopped').count()

        # uploads of every kind, the last of them completed, and one that is none
        page.get_by_role('tab', name='Complete').click()
        page.get_by_label('1', exact=True).check()
        page.get_by_label('number input for rows to keep').fill('60')
        (tmp_path / 'none.jpg').write_text('no picture')
        for upload in sorted(PHOTOS.iterdir()) if PHOTOS.is_dir() else [ROOT / 'out' / 'readme' / 'first_F85.png']:
            if page.get_by_label('Clear').count():
                page.get_by_label('Clear').first.click()
            before = painting()
            page.locator('input[type=file]').first.set_input_files(upload)
            changes(before)
        preview = painting()
        page.get_by_role('button', name='Complete', exact=True).click()
        changes(preview)
        status('256 pixels in')
        page.get_by_label('number input for rows to keep').fill('')  # while another number is typed
        page.get_by_label('number input for rows to keep').fill('60')
        page.get_by_label('Clear').first.click()
        assert not page.get_by_text(re.compile('Could not preprocess|less than minimum')).count()
        page.locator('input[type=file]').first.set_input_files(tmp_path / 'none.jpg')
        page.get_by_text('none.jpg cannot be read as a picture').wait_for(timeout=10_000)
        assert [url for url in elsewhere if not url.startswith(('http://127.0.0.1', 'data:', 'blob:'))] == []

        # Ctrl-C in the middle of a painting, with the page open, ends it at once: serving looks at what stays
        page.get_by_role('tab', name='Paint').click()
        page.get_by_label('9', exact=True).check()
        before = painting()
        page.get_by_role('button', name='Paint', exact=True).click()
        changes(before)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ('', None) and process.returncode == 0
        browser.close()

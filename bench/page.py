"""Open the page of sample.py --web in Chromium: time it, take screenshots, and film it for the README.

    pip install 'gradio>=6' playwright                  # and Chromium: apt-get install chromium
    python bench/page.py                                # out/page/*.png, and page.gif: copied to out/readme
"""
import io
import re
import shutil
import subprocess
import sys
import time

from PIL import Image
from playwright.sync_api import sync_playwright

from common import ROOT, argument_parser
import extras

PAINTING = 'img[src*="file="]'


def start(ckpt):
    """Start the page. Return its process and address."""
    process = subprocess.Popen([sys.executable, ROOT / 'sample.py', '--ckpt', ckpt, '--web', '--host', '127.0.0.1'],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if address := re.search(r'http://[\d.]+:\d+', line):
            return process, address[0]
    raise extras.UserError('the page does not start')


def photograph(browser, address, name, size, scheme, folder):
    """Paint four pictures and save a screenshot. Return how long the first pixels take, and all."""
    page = browser.new_page(viewport=dict(zip(('width', 'height'), size)), color_scheme=scheme)
    page.goto(address)
    button = page.get_by_role('button', name='Paint', exact=True)
    button.wait_for()
    began = time.monotonic()
    button.click()
    page.wait_for_function(f"document.querySelector('{PAINTING}')?.naturalWidth > 0", polling=20)
    first = time.monotonic() - began
    page.get_by_text('pixels/s').wait_for(timeout=120_000)
    total = time.monotonic() - began
    page.screenshot(path=folder / f'{name}_{scheme}.png', full_page=True)
    page.close()
    return first, total


def film(browser, address, colours):
    """Return screenshots of four pictures being painted from each of the colours, and when each was taken."""
    page = browser.new_page(viewport=dict(width=1100, height=690))
    page.goto(address)
    shots, times = [], []

    def shoot(seconds=0.0):
        shots.append(Image.open(io.BytesIO(page.screenshot())).convert('RGB'))
        times.append(time.monotonic())
        time.sleep(seconds)

    page.get_by_role('button', name='Paint', exact=True).wait_for()
    shoot(0.5)
    for colour in colours:
        page.locator('.dialog-button').first.click()
        page.locator('input[type=text]').first.fill(colour)
        page.keyboard.press('Enter')
        shoot(0.7)
        page.get_by_role('button', name='Paint from this first pixel').click()
        page.get_by_text('painting ...').wait_for(timeout=60_000)
        while not page.get_by_text('pixels/s').count():
            shoot()
        shoot(1.5)
    page.close()
    return shots, [*times[1:], time.monotonic()], times


def save_film(shots, durations, path):
    """Save a GIF of screenshots, two thirds as large, with one palette of 200 colours."""
    frames = [shot.resize((733, 440), Image.Resampling.LANCZOS) for shot in shots]
    some = frames[::max(1, len(frames) // 8)]
    palette = extras.sheet(some, 1).quantize(200, dither=0)
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    extras.save_picture(frames[0], path, save_all=True, append_images=frames[1:], loop=0, duration=durations)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--ckpt', default=str(ROOT / 'out' / 'ckpt6000.pt'))
    args = parser.parse_args()
    folder = ROOT / 'out' / 'page'
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    process, address = start(args.ckpt)
    try:
        print(f'started after {time.monotonic() - began:.1f} s')
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
            for name, size in (('desktop', (1366, 768)), ('phone', (390, 844))):
                for scheme in ('light', 'dark'):
                    first, total = photograph(browser, address, name, size, scheme, folder)
                    print(f'{name}, {scheme}: first pixels after {first:.2f} s, four pictures after {total:.1f} s')
            shots, ends, times = film(browser, address, ['#88aaff', '#ff8855', '#447722'])
            browser.close()
        durations = [max(20, round(1000 * (end - begin))) for begin, end in zip(times, ends)]
        save_film(shots, durations, str(folder / 'page.gif'))
        size = (folder / 'page.gif').stat().st_size
        print(f'{folder}/page.gif: {len(shots)} frames, {sum(durations) / 1000:.0f} s, {size / 1e6:.2f} MB')
    finally:
        process.terminate()


if __name__ == '__main__':
    extras.run(main)

"""Measure how fast prepare.py reads pictures, and how much memory it takes.

    python bench/preparing.py                                 # large JPEGs drawn here
    python bench/preparing.py --source ../shared/photos64     # and a folder of your own

For every source and number of workers: images a second from the first to the last (start-up included), and the peak
memory of all its processes together (proportional set size, so that shared pages count once; Linux only).
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from common import argument_parser, command, table_head, table_row
import prepare


def draw_large_jpegs(folder, count, width=4000, height=3000):
    """Write camera-sized JPEGs into a new folder: enlarged synthetic landscapes with grain, about 3 MB each."""
    folder.mkdir()
    source = prepare.Synthetic(count, seed=1, size=64)
    rng = np.random.default_rng(1)
    grain = rng.normal(0, 8, (height, width, 1))
    for i in range(count):
        image = np.asarray(source.picture(i).resize((width, height), Image.Resampling.BICUBIC))
        image = image + np.roll(grain, i * 101, axis=1)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.jpg', quality=92)
    return folder


def tree_memory(pid):
    """Return the proportional set size of a process and all its descendants, in bytes."""
    total, todo = 0, [pid]
    while todo:
        pid = todo.pop()
        try:
            for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
                if line.startswith('Pss:'):
                    total += int(line.split()[1]) * 1024
            for task in Path(f'/proc/{pid}/task').iterdir():
                todo += map(int, (task / 'children').read_text().split())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass  # it has just ended
    return total


def measure(source, workers, out_dir, *options):
    """Run prepare.py once. Return its seconds, its peak memory in bytes, and the number of images."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        command('prepare.py', '--source', source, '--out_dir', out_dir, '--workers', workers, *options),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f'prepare.py failed on {source}')
    images = (out_dir / 'train.bin').stat().st_size + (out_dir / 'val.bin').stat().st_size
    return seconds, peak, images // (2 * 64 * 64)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('--source', action='append', default=[], help='a folder to measure; may be given several times')
    parser.add_argument('--large', type=int, default=100, help='how many large JPEGs to draw (0: none)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        sources = [(source, []) for source in args.source]
        if args.large:
            sources.append((draw_large_jpegs(temporary / '4000x3000 JPEGs', args.large), []))
        # constant memory: ten times the images, the same peak
        sources += [('synthetic', ['--num_images', count]) for count in ('1000', '10000')]
        print(table_head('source', 'images', 'workers', 'seconds', 'images/s', 'peak MB'))
        for source, options in sources:
            for workers in sorted({1, os.cpu_count()}):
                seconds, peak, images = measure(source, workers, temporary / 'out', *options)
                print(table_row(Path(source).name, f'{images:,}', workers, f'{seconds:.1f}',
                                f'{images / seconds:,.0f}', f'{peak / 1e6:.0f}'), flush=True)


if __name__ == '__main__':
    main()

"""Run the record track: two CPU cores, one hour, 64x64 synthetic landscapes, scored by bits per pixel on validation.

    python bench/record.py config/landscape.py [--key=value ...]       # config/seed.py is the first row of the table

Draws the data if they are not there yet (10,000 images from seed 1337, 1,000 of them for validation; the same bytes
on every machine), measures a few iterations, and trains for as many as fit into the hour, validation not counted.
Leave the machine idle.
"""
import statistics
import sys
from pathlib import Path

from common import ROOT, read_log, run_script

DATA, HOUR = ROOT / 'data' / 'track', 3600


def train(out_dir, options):
    """Train a model. Return the rows of its log."""
    fixed = [f'--data_dir={DATA}', f'--out_dir={out_dir}', '--num_samples=16', '--overwrite=True']
    run_script('train.py', *options, *fixed)
    return read_log(out_dir)


def main():
    options = sys.argv[1:]
    if not options or not options[0].endswith('.py'):
        sys.exit(__doc__)
    name = '_'.join([Path(options[0]).stem, *(option.strip('-').replace('/', '') for option in options[1:])])
    out_dir = ROOT / 'out' / 'record' / name
    if not (DATA / 'meta.pkl').exists():
        run_script('prepare.py', '--source', 'synthetic', '--num_images', 10000, '--seed', 1337, '--out_dir', DATA)
    no_evaluation = ['--eval_at=()', '--eval_interval=0']  # during the run
    # a trial run measures the seconds of an iteration
    trial = train(out_dir / 'trial', [*options, '--max_iters=10', '--log_interval=1', *no_evaluation])
    times = [float(row['seconds']) for row in trial if row['train_loss']]
    iterations = int(HOUR / statistics.median(after - before for before, after in zip(times, times[1:])))
    rows = train(out_dir, [*options, f'--max_iters={iterations}', *no_evaluation])
    last = [row for row in rows if row['val_loss']][-1]
    score, images, seconds = float(last['bits_per_pixel']), int(last['images']), float(last['seconds'])
    print(f"\n{' '.join(options)}: {score:.3f} bits per pixel after {images:,} images in {seconds / 60:.0f} min, "
          f"{images / seconds:.2f} images/s")


if __name__ == '__main__':
    main()

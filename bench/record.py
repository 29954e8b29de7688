"""Run the record track: two CPU cores, one hour, 64x64 synthetic landscapes, scored by bits per pixel on validation.

    python bench/record.py config/landscape.py [--seeds 2] [--key=value ...]   # the table's first row: config/seed.py

Draws the data if they are not there yet (10,000 images from seed 1337, 1,000 of them for validation; the same bytes
on every machine), measures the iterations of a minute, and trains for as many as fit into the hour, validation not
counted.
--seeds 2 trains twice, two hours, and prints mean and spread. --data data/photos scores photographs instead. Leave
the machine idle.
"""
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, argument_parser, command, read_log, run_script

TRACK, HOUR = ROOT / 'data' / 'track', 3600
NO_EVALUATION = ['--eval_at=()', '--eval_interval=0']  # during a run


def arguments(data, out_dir, options):
    """Return the arguments of train.py for a model."""
    return [*options, *NO_EVALUATION, f'--data_dir={data}', f'--out_dir={out_dir}', '--num_samples=16',
            '--overwrite=True']


def iterations_within(seconds, data, out_dir, options):
    """Return how many iterations fit into so many seconds, by a trial run of a sixtieth of them, ten at least.

    On some machines the speed changes within the minute.
    """
    trial = subprocess.Popen(command('train.py', *arguments(data, out_dir, options), '--max_iters=1000000',
                                     '--log_interval=1'))
    times = []
    while len(times) < 10 or times[-1] < seconds / 60:
        if trial.poll() is not None:
            sys.exit('the trial run has failed')
        time.sleep(1)
        times = [float(row['seconds']) for row in read_log(out_dir)] if (out_dir / 'log.csv').exists() else []
    trial.terminate()  # it finishes its iteration; Ctrl-C would not reach it under nohup
    trial.wait()
    return int(seconds / statistics.mean(after - before for before, after in zip(times, times[1:])))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument('config')
    parser.add_argument('--seeds', type=int, default=1, help='how many runs, one after the other')
    parser.add_argument('--data', type=Path, default=TRACK)
    parser.add_argument('--seconds', type=float, default=HOUR, help='of training, for each run')
    args, options = parser.parse_known_args()
    options = [args.config, *options]
    if args.data == TRACK and not (TRACK / 'meta.pkl').exists():
        run_script('prepare.py', '--source', 'synthetic', '--num_images', 10000, '--seed', 1337, '--out_dir', TRACK)
    name = '_'.join([Path(args.config).stem, *(option.strip('-').replace('/', '') for option in options[1:])])
    scores = []
    for seed in range(1337, 1337 + args.seeds):  # from train.py's own on
        out_dir = ROOT / 'out' / 'record' / args.data.name / name / f'seed{seed}'
        seeded = [*options, f'--seed={seed}']
        iterations = iterations_within(args.seconds, args.data.resolve(), out_dir / 'trial', seeded)
        run_script('train.py', *arguments(args.data.resolve(), out_dir, seeded), f'--max_iters={iterations}')
        last = [row for row in read_log(out_dir) if row['val_loss']][-1]
        scores.append(float(last['bits_per_pixel']))
        images, seconds = int(last['images']), float(last['seconds'])
        print(f"\n{' '.join(seeded)}: {scores[-1]:.3f} bits per pixel after {images:,} images in {seconds / 60:.0f} "
              f'min, {images / seconds:.2f} images/s\n', flush=True)
    if len(scores) > 1:
        print(f'mean {statistics.mean(scores):.3f}, from {min(scores):.3f} to {max(scores):.3f}')


if __name__ == '__main__':
    main()

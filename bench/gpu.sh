#!/usr/bin/env bash
# All that the README says of a GPU, in one go: tests, timings, sampling, and a run that fills the rest of the time.
#     bash bench/gpu.sh data/photos out/gpu 600        # data, a folder for everything that comes out, seconds
# Every stage has its own limit, and none stops the next. DEVICE=cpu BATCH=2 rehearses it (with a data set of small images).
# OPTIONS='--exclusive=True --learning_rate=8e-3' changes the recipe of the run.
set -u
data=$(realpath "$1"); mkdir -p "$2"; out=$(realpath "$2"); seconds=$3
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} batch=${BATCH:-32}
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$out/compiled
stage() { echo "== $SECONDS s: $*"; }

stage tests, and beside them what has to be compiled, untimed
timeout 150 $python -m pytest -q -n 8 -p no:cacheprovider ${TESTS:-tests/test_model.py tests/test_train.py tests/test_sample.py} >"$out/tests.txt" 2>&1 &
for b in 8 $batch 128; do [ "$device" = cpu ] || timeout 150 $python bench/training.py --batch $b --compile yes --steps 1 >/dev/null 2>&1 & done
wait
tail -n 3 "$out/tests.txt"

stage a training step
[ "$device" = cpu ] && batches=1 || batches="8 $batch 128"
timeout 120 $python bench/training.py --device $device --batch $batches --steps 4 2>"$out/errors.txt" | tee "$out/training.md"
[ "$device" = cpu ] || timeout 60 $python bench/training.py --models recommended --batch $batch --compile yes --steps 1 --profile >"$out/profile.txt" 2>&1

stage sampling
timeout 120 $python bench/sampling.py --device $device --batch ${SAMPLES:-1 32 256 1000} 2>>"$out/errors.txt" | tee "$out/sampling.md"
timeout 60 $python bench/sampling.py --device $device --batch 1 --eager 2>>"$out/errors.txt" | tee -a "$out/sampling.md"

run() { timeout $((seconds - SECONDS)) $python train.py config/landscape_gpu.py --device=$device --data_dir="$data" --batch_size=$batch --overwrite=True ${OPTIONS:-} "$@"; }

stage a short run, to see how many iterations fit
trial=${TRIAL:-300}
run --out_dir="$out/trial" --max_iters=$trial --log_interval=$((trial / 3)) --eval_at="()" --num_samples=1 >"$out/trial.txt" 2>&1
tail -n 1 "$out/trial.txt"
# 45 seconds are for starting, evaluating and painting
iterations=$($python - "$out/trial/log.csv" $((seconds - SECONDS - 45)) <<'END'
import csv, sys
rows = [row for row in csv.DictReader(open(sys.argv[1])) if row['train_loss']]
first, last = ((int(row['iteration']), float(row['seconds'])) for row in (rows[0], rows[-1]))
print(max(8, int(int(sys.argv[2]) / 1.03 / (last[1] - first[1]) * (last[0] - first[0]))))
END
)
stage "training, $iterations iterations of $batch"
run --out_dir="$out/run" --max_iters=$iterations --eval_at="($((iterations / 8)), $((iterations / 2)))" >"$out/train.txt" 2>&1
tail -n 3 "$out/train.txt"
stage done

# The run behind `make demo`: small synthetic landscapes, two and a half minutes on two fast CPU cores.
data_dir = 'data/demo'  # python prepare.py --source synthetic --size 24 --num_images 6000 --out_dir data/demo
out_dir = 'out/demo'

n_layer = 4
n_head = 4
n_embd = 64  # narrow, to see more images a second

batch_size = 4
max_iters = 1200  # 4,800 images

learning_rate = 4e-3
min_lr = 4e-5
warmup_iters = 50
beta2 = 0.99  # a longer memory than for 40 images an iteration: a batch of four is noisy

eval_interval = 600
log_interval = 50

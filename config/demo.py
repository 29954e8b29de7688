# The run behind `make demo`: small synthetic landscapes, a few minutes on two CPU cores.
data_dir = 'data/demo'  # python prepare.py --source synthetic --size 32 --num_images 4000 --out_dir data/demo
out_dir = 'out/demo'

n_layer = 4
n_head = 4
n_embd = 128

batch_size = 4
max_iters = 600

learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 50
beta2 = 0.99

eval_interval = 300
log_interval = 20

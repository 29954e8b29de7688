# The run behind `make demo`: the recommended recipe, narrow, on small synthetic landscapes; minutes on two CPU cores.
data_dir = 'data/demo'  # python prepare.py --source synthetic --size 24 --num_images 6000 --out_dir data/demo
out_dir = 'out/demo'

n_layer = 4
n_head = 4
n_embd = 64  # narrow, to see more images a second
row_column_positions = True
neighbours = 12
factorised_colours = True
relative_colours = True
attention = 'local column'
reach = 6
alibi = True

batch_size = 4
max_iters = 1200  # 4,800 images

learning_rate = 3e-3
muon_lr = 0.02
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99  # a batch of four is noisy

eval_interval = 600
log_interval = 50

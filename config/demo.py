# The run behind `make demo`: the recommended recipe, narrow, on small synthetic landscapes (to which relative_chroma
# brings nothing); minutes on two CPU cores.
data_dir = 'data/demo'  # python prepare.py --source synthetic --size 24 --num_images 4000 --out_dir data/demo
out_dir = 'out/demo'

n_layer = 2
n_head = 4
n_embd = 64  # narrow, to see more images a second
n_colour = 32
row_column_positions = True
neighbours = 12
relative_neighbours = True
relative_colours = True
attention = 'local column'
reach = 6
alibi = True
exclusive = True

batch_size = 3
max_iters = 1000  # 3,000 images

learning_rate = 8e-3
muon_lr = 0.02
min_lr = 1e-5
warmup_iters = 50
weight_decay = 0.0
beta2 = 0.99  # a batch of three is noisy
average = 0.1

eval_interval = 500
log_interval = 50

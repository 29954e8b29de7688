# What a bigger budget buys: the recipe of landscape_gpu.py, twice as wide. On 13,528 photographs it came to 2.749 bits
# per pixel after 355 seconds of an H200, where that model came to 2.754 after 255.
#     python train.py config/landscape_large.py --data_dir=data/both
data_dir = 'data/landscape'  # python prepare.py
out_dir = 'out/large'

n_layer = 8
n_head = 8
n_embd = 256  # 7.2M parameters
n_colour = 64
row_column_positions = True
neighbours = 12
relative_colours = True
attention = 'local column'
reach = 6
alibi = True  # what is near counts more
dropout = 0.1  # it sees every image many times

batch_size = 32
max_iters = 9000  # 288,000 images

learning_rate = 4e-3
muon_lr = 0.03
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99
average = 0.1

eval_at = (1500, 4500)
eval_batch_size = 32
log_interval = 100

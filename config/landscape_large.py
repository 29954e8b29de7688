# What a bigger budget can buy: the recommended recipe, wider and deeper, with more images an iteration, for one GPU.
# Nobody has measured it: no GPU was at hand. Size, neighbours, attention, dropout and batch are not those that landscape.py was measured with.
#     python train.py config/landscape_large.py --data_dir=data/photos
data_dir = 'data/landscape'  # python prepare.py
out_dir = 'out/large'

n_layer = 8
n_head = 8
n_embd = 256  # 10.7M parameters
row_column_positions = True
neighbours = 24  # all of the three rows above and three pixels to the left
factorised_colours = True
relative_colours = True
attention = 'local column local full'  # a GPU can afford to look at the whole image in every fourth layer
alibi = True  # what is near counts more
dropout = 0.1  # it sees every image many times

batch_size = 32
max_iters = 20000

learning_rate = 3e-3
muon_lr = 0.02
min_lr = 1e-5
warmup_iters = 200

eval_at = (200, 400, 800, 1600, 3000, 6000, 10000, 15000)
log_interval = 50

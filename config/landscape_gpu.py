# Five minutes of an H200, thirty times as many images as two CPU cores see in an hour. out/ckpt6000.pt holds the last
# weights of such a run, ckpt12300.pt (under the ancestor's name), made before there were relative_neighbours,
# relative_chroma and exclusive. Each of 13,528 pictures was seen 29 times; with fewer pictures make max_iters smaller.
#     python train.py config/landscape_gpu.py --data_dir=data/photos
data_dir = 'data/landscape'  # python prepare.py
out_dir = 'out/landscape_gpu'

n_layer = 8
n_head = 4
n_embd = 128  # 1.9M parameters, all told
n_colour = 32  # small vectors for the colours leave parameters for eight layers
row_column_positions = True
neighbours = 12  # up to two rows above and two columns aside
relative_colours = True
attention = 'local column'  # in turn
reach = 6  # so that pixels along a diagonal do not depend on each other; costs 0.02 bits
alibi = True  # what is near counts more

batch_size = 32  # with four layers a step of 128 takes more than three times as long as one of 32
max_iters = 12300  # 393,600 images

learning_rate = 4e-3  # embeddings
muon_lr = 0.03  # matrices
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99
average = 0.1  # halfway through the schedule averaged weights are far better, at its end no more

eval_at = (1500, 6000)
eval_batch_size = 32
log_interval = 100

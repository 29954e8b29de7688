# The recommended recipe: the same transformer, which now sees in two dimensions, 12,000 images in 6,000 small steps.
# About forty minutes on two CPU cores with AMX (bfloat16), an hour without.
data_dir = 'data/landscape'  # python prepare.py

n_layer = 4
n_head = 4
n_embd = 128  # 1.8M parameters, all told
row_column_positions = True
neighbours = 12  # those at most two rows up and two columns aside
factorised_colours = True
relative_colours = True
attention = 'local column'  # by turns; a small part of the time and the cache that full attention takes

batch_size = 2  # small batches learn as much from an image as large ones, and take more steps
max_iters = 6000

learning_rate = 3e-3  # embeddings and head
muon_lr = 0.02  # the matrices of the blocks: after 1,200 images of 32x32 3.54 bits, with AdamW 4.35 (bench/ablations.py)
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99  # a batch of two is noisy

eval_at = (200, 400, 800, 1600, 3000, 6000)  # dense early, where pictures change fast
log_interval = 50

# The recommended recipe: nanoGPT's transformer, seeing in two dimensions; 48,000 images in 6,000 steps. It takes three
# to five hours on two CPU cores that know bfloat16, twice that on others; --batch_size=2 a quarter, for 12,000 images.
data_dir = 'data/landscape'  # python prepare.py

n_layer = 4
n_head = 4
n_embd = 128
n_colour = 32  # a colour's vector; 1.2M parameters, all told
row_column_positions = True
neighbours = 12  # up to two rows above and two columns aside
relative_neighbours = True  # worth a tenth of a bit
relative_colours = True
relative_chroma = True
attention = 'local column'  # in turn; a fraction of the time and the cache that full attention takes
reach = 6  # pixels along a diagonal are painted together, several times as fast; costs 0.01 to 0.02 bits
alibi = True  # what is near counts more
exclusive = True  # attention adds what a pixel does not know already

batch_size = 8  # one image each for eight GPUs; smaller batches learn a little more from an image, but need more steps
max_iters = 6000

learning_rate = 8e-3  # embeddings
muon_lr = 0.02  # the matrices: Muon is worth a quarter of a bit (bench/ablations.py)
min_lr = 1e-5
warmup_iters = 50
weight_decay = 0.0
beta2 = 0.99  # a small batch is noisy
average = 0.1  # averaged weights: half-trained ones paint well, too

eval_at = (200, 400, 800, 1600, 3000, 6000)  # dense early, where pictures change fast
temperature = 0.98  # its own pictures cost it as many bits as photographs; at 1.0 they cost half a bit a pixel more

# About an hour on two CPU cores: the plain GPT on photographs.
#     python prepare.py --source FOLDER --out_dir data/photos
data_dir = 'data/photos'
out_dir = 'out/photos_cpu'

n_layer = 4
n_head = 4
n_embd = 128

batch_size = 2  # small batches learn as much from an image as large ones, and take more steps
max_iters = 2400  # 4,800 images

learning_rate = 2e-3  # short trials at 32x32, one seed: better than 1e-3 (both beta2 0.95) and than 4e-3 (both 0.99)
min_lr = 1e-5
warmup_iters = 100
beta2 = 0.99  # better than 0.95 in the same trials: a batch of two is noisy

eval_interval = 1200  # all validation images take minutes on a CPU
eval_batch_size = 1  # the logits of one image, 64 MB, are as much as two cores want to see at a time
num_samples = 16
log_interval = 20

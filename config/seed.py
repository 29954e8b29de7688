# The ancestor: nanoGPT's model with the settings of nanoGPT-BMP; the first pixel is given and never predicted. The
# baseline of the record track.
data_dir = 'data/landscape'  # python prepare.py
out_dir = 'out/seed'

start_embedding = False  # 4,095 positions
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 40  # images an iteration
gradient_accumulation_steps = 5  # 8 images at a time, to save memory
max_iters = 10000

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 200
flip = False  # the ancestor showed every image as it is

eval_at = (200, 400, 800, 1600, 3000, 6000, 10000)

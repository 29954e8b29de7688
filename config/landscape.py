# The ancestor's experiment, done right: images aligned to rows, every pixel predicted, every validation image counted.
# Meant for one GPU; on a CPU see photos_cpu.py.
data_dir = 'data/landscape'  # python prepare.py

n_layer = 4
n_head = 4
n_embd = 128  # 1.3M parameters

batch_size = 40  # images an iteration: 163,840 pixels
gradient_accumulation_steps = 5  # 8 images at a time: the logits of one image alone take 64 MB
max_iters = 10000

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 200

eval_at = (200, 400, 800, 1600, 3000, 6000, 10000)  # dense early, where pictures change fast
keep_checkpoints = 10  # all of them

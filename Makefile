# make demo: from a fresh clone to a sheet of painted landscapes, in minutes on two CPU cores
# make test: the whole test suite
# make web: a page on which to play with the model that comes along
# They make their own environment. Other versions, here the last NumPy 1 (newer releases of pyarrow want NumPy 2):
#     make test VENV=.venv-numpy1 NUMPY="'numpy<2' 'pyarrow<24'"

PYTHON ?= python3
VENV ?= .venv
# pinned to what this was tested with; on Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares several GB of CUDA packages
TORCH ?= torch==2.13.0
NUMPY ?= 'numpy>=1.26'
BIN = $(VENV)/bin

.PHONY: demo test web clean

demo: $(VENV)/installed
	$(BIN)/python prepare.py --source synthetic --size 24 --num_images 4000 --out_dir data/demo
	$(BIN)/python train.py config/demo.py --overwrite=True
	$(BIN)/python sample.py --ckpt out/demo/ckpt1000.pt --top_p 0.97 --scale 4 --out out/demo/landscapes.png
	@echo 'Look at out/demo/landscapes.png, and at data/demo/preview.png, which it has learnt from.'

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

web: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check --quiet 'gradio>=6'
	$(BIN)/python sample.py --ckpt out/ckpt6000.pt --web

# the file stands for a finished installation: one that was interrupted is done again
$(VENV)/installed: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check '$(TORCH)' $(NUMPY) pytest pytest-xdist -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) data/demo out/demo

# make demo   train on handwritten digits, sample, look: three to four minutes on two cores
# make test   all but the slow tests, a quarter of an hour;  make test-slow  those, with the demo
# make bench  what docs/performance.md shows, measured here; three quarters of an hour on two idle cores
# make peers  the environment of the libraries that the benchmarks measure against
# make check  lint, format and types, as CI runs it

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
PY = $(VENV)/bin/python
DEMO = $(RUNS)/demo
PEERS = .venv-peers

.PHONY: demo test test-slow bench peers check clean

# One thread: the network is so small that more would mostly wait for each other
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.demo
	$(PY) datasets/digits.py $(DEMO)/digits
	$(PY) scripts/image_train.py --log_dir $(DEMO)/train --data_dir $(DEMO)/digits \
	    --image_size 8 --channels 1 --class_cond True --learn_sigma True \
	    --noise_schedule cosine --predict v --num_channels 32 --num_res_blocks 1 \
	    --attention_resolutions 4 --batch_size 64 --lr 2e-3 --ema_rate 0.99 \
	    --lr_anneal_steps 1500 --log_interval 100 --save_interval 500
	$(PY) scripts/image_sample.py --log_dir $(DEMO)/samples \
	    --model_path $(DEMO)/train/ema_0.99_001500.pt --num_samples 500 --classes all \
	    --batch_size 100 --sampler dpmpp_2m --steps 15
	$(PY) benchmarks/demo_quality.py $(DEMO)/samples
	@echo "Look at $(DEMO)/samples/grid.png"

# One thread: the tests' networks are small too, and some tests start several processes
test test-slow: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(PY) -m pytest -m "not slow"

test-slow: $(VENV)/.test
	$(PY) -m pytest -m slow

BENCHMARKS = import unet train sample loader save scaling
bench: $(VENV)/.demo
	$(MAKE) peers || echo "without peers"
	for name in $(BENCHMARKS); do $(PY) benchmarks/bench_$$name.py || exit 1; done
	$(PY) benchmarks/performance_tables.py

check: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# An environment with the tested versions and the extra that a target needs
$(VENV)/.%: setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# denoising-diffusion-pytorch without what it asks for beside the requirements: torchvision, which
# its worker can do without, and a package for scores
peers: $(PEERS)/.made
$(PEERS)/.made: benchmarks/peers-requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check -r $<
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	    denoising-diffusion-pytorch==2.3.4
	touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache

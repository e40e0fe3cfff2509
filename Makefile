# Each target does all set-up that it needs, in a virtual environment of its own: the first call installs, later calls take no time.
#
# Variables, as in `make test PYTHON=python3.12 WORKERS=8`:
#   PYTHON    interpreter to build the environment from (3.10 or newer). If it has a torch that suits this machine, that torch and
#             whatever lies beside it are used as they are and nothing of it is downloaded.
#   VENV      where the environment lies.
#   TORCH     what pip is asked for where PYTHON has no torch: a requirement (in quotes of its own if it holds < or >), a wheel file,
#             or either with options in front.
#             On a Linux machine without a GPU the default may bring a build for CUDA of several GB. For a small one name an index
#             of CPU wheels: make demo TORCH='--index-url URL torch'; PyTorch's installation page has the URL.
#   PIP_ARGS  more options for every call of pip.
#   WORKERS   processes that share the tests.
#   ARGS      more options for the target's own command, such as ARGS='-k plan -x' for `make test`.

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
WORKERS  ?= 2
ARGS     ?=

# Asked only while the environment is made.
NUM_GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH   ?= $(if $(filter 0,$(NUM_GPUS)),torch==2.13.0,torch)
TORCH_NOTE = $(if $(filter Linux0,$(shell uname)$(NUM_GPUS)), (no GPU here; if this fetches gigabytes for CUDA see TORCH in the Makefile))

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check --no-input install $(PIP_ARGS)

# One thread per process: the tests' matrices are small, and the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

FACES := $(wildcard tests/test_huggingface*.py tests/test_megatron*.py tests/test_torchtitan*.py tests/test_fsdp*.py) \
	tests/test_convert_transformers.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo ablation test test-all test-faces gpu lint coverage docs wheel smoke format bench-cpu bench-gpu doctor clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.has-base ## train a small MoE language model on this machine, beside a dense one
	$(PY) -m examples.train_moe_lm --preset demo --compare dense --out report/demo --overwrite $(ARGS)

ablation: $(VENV)/.has-base ## the same model under every routing, a quick look; ARGS='--workers 2 --out DIR' and more
	$(PY) -m examples.routing_ablation --quick $(ARGS)

test: lint $(VENV)/.has-test ## lint, then every test that this machine can run in some minutes
	$(PYTEST) --long -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

test-all: lint $(VENV)/.has-test ## the same, and the slow tests
	$(PYTEST) --long -n $(WORKERS) --dist worksteal --durations=15 -m "slow or not slow" $(ARGS)

test-faces: $(VENV)/.has-faces ## the tests of Hugging Face, Megatron-core and torchtitan, with those packages
	$(PYTEST) --long -n $(WORKERS) --dist worksteal --durations=15 $(FACES) $(ARGS)

gpu: $(VENV)/.has-test ## only the tests that need a GPU
	$(PY) -m pytest -m "gpu or hopper or multigpu" $(ARGS)

lint: $(VENV)/.has-lint ## ruff (faults, format) and mypy
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .
	$(PY) -m mypy --no-error-summary

coverage: $(VENV)/.has-coverage $(VENV)/.has-faces ## the tests again, and all faces': lines of sonic/ that none reaches
	rm -f .coverage .coverage.*
	$(PYTEST) --long -n $(WORKERS) --dist worksteal --cov --cov-fail-under=92 --cov-report=term:skip-covered --cov-report=html:report/coverage $(ARGS)

docs: $(VENV)/.has-docs ## this project's site, warnings as errors, into report/docs
	$(PY) -m sphinx -q -W --keep-going -b html docs report/docs $(ARGS)
	@echo "open report/docs/index.html"

wheel: $(VENV)/.has-wheel ## a wheel and an sdist, into dist/
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist $(ARGS)

smoke: wheel ## install that wheel into an empty environment of PYTHON, and use it there
	rm -rf dist/smoke && $(PYTHON) -m venv dist/smoke
	dist/smoke/bin/python -m pip --quiet --disable-pip-version-check --no-input install $(PIP_ARGS) $(TORCH) dist/*.whl
	cp tests/smoke.py dist/smoke/smoke.py && cd dist/smoke && PYTHONPATH= bin/python smoke.py

format: $(VENV)/.has-lint ## let ruff mend and format what it can
	$(PY) -m ruff check --quiet --fix .
	$(PY) -m ruff format --quiet .

bench-cpu: $(VENV)/.has-base ## time the MoE layer against other ways to compute it, on this CPU
	$(PY) -m benchmarks.cpu_moe $(ARGS)

bench-gpu: $(VENV)/.has-test ## every benchmark and GPU test in one command; ARGS='--resume', ARGS='--dry-run' and more
	$(PY) -m sonic bench --suite gpu $(ARGS)

doctor: $(VENV)/.has-base ## what sonic finds on this machine, and what is missing
	$(PY) -m sonic doctor $(ARGS)

setup: $(VENV)/.has-base $(VENV)/.has-test $(VENV)/.has-lint ## only make the environment
	@echo "$(VENV) has what all targets need"

clean: ## remove the environment, caches and reports
	rm -rf "$(VENV)" report build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- set-up
# A stamp is written last, so a set-up that was cut short starts again where it stopped. The setuptools that some Pythons put into
# a new environment is too old, and would hide a newer one that PYTHON lends.

# Prints a line for a .pth file that lends the packages of PYTHON to the environment, if its torch suits this machine.
# (--system-site-packages would not do: it passes over the packages of a PYTHON that is itself a virtual environment.)
define LEND_TORCH
import sys
try:
    import torch
except (ImportError, OSError):
    sys.exit()
is_recent = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
if is_recent and (sys.argv[1] == "0" or torch.version.cuda or torch.version.hip):
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    print("import site;", "; ".join(f"site.addsitedir({path!r})" for path in folders))
endef
export LEND_TORCH

$(VENV)/.has-base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"sonic needs Python 3.10 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=... names another")'
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv --clear "$(VENV)" && $(PY) -m pip -qq uninstall --yes setuptools; }
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && $(PYTHON) -c "$$LEND_TORCH" $(NUM_GPUS) > "$$site/lent_packages.pth"
	@$(PY) -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)$(TORCH_NOTE)"; $(PIP) $(TORCH); }
	@echo "installing what sonic and its examples need"
	@$(PIP) 'setuptools>=77'
	@$(PIP) --no-build-isolation --editable '.[examples]'
	@touch $@

$(VENV)/.has-test $(VENV)/.has-lint $(VENV)/.has-coverage $(VENV)/.has-faces $(VENV)/.has-docs $(VENV)/.has-wheel: $(VENV)/.has-%: $(VENV)/.has-base
	@echo "installing what '$*' needs"
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

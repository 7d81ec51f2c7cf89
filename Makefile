# For GNU make 3.81 and later. Paths are relative, so that the folder's name may hold spaces.
export PYTHON PIP_ARGS
ifeq ($(strip $(HOME)),)
unexport HOME
endif

.PHONY: help run test matrix install clean

help:
	@echo 'make run [DATA=FILE] [ARGS=OPTIONS]   train a model; ARGS go to pyro-vae fit'
	@echo 'make test [ARGS=OPTIONS]              lint, types, tests and doctests; ARGS go to pytest'
	@echo 'make matrix                           every prior x family x likelihood, by hand'
	@echo 'make install                          make .venv, or bring it up to date (run and test make it when missing)'
	@echo 'make clean                            remove .venv, builds and caches; runs/ stays'
	@echo
	@echo 'make install PYTHON=python3.12        with a Python of your choice (>= 3.11)'
	@echo 'make install PIP_ARGS="--index-url URL --extra-index-url URL"'
	@echo '                                      with other wheels, such as the far smaller CPU-only torch:'
	@echo '                                      see the PyTorch site for their URL; PyPI is the extra index'

run: .venv/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/pyro-vae fit $(if $(DATA),--data "$(DATA)") $(ARGS)

test: .venv/.installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -rfEs --doctest-modules pyro_vae tests $(ARGS)

matrix: .venv/.installed
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q tests/test_matrix.py --matrix $(ARGS)

install:
	@sh scripts/install.sh

# A .venv whose Python no longer runs counts as missing.
ifneq ($(shell .venv/bin/python -c 'print(1)' 2>/dev/null),1)
.PHONY: .venv/.installed
endif
.venv/.installed: pyproject.toml
	@sh scripts/install.sh

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up what it needs: a virtual environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench clean

demo: .venv/installed
	$(BIN)/vsrplug demo

# Two processes of one thread each: the tests' networks are too small to share out.
test: .venv/installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# mypy sees the mapped folders as one package only in a strict editable install, outside the checkout's root.
lint: .venv/installed-dev .venv-types/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd tests && ../.venv-types/bin/python -m mypy --config-file ../pyproject.toml

# The site, in site/.
docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

bench: .venv/installed
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv .venv-types demo runs site

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vsrplug needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/installed

# The types of torch come from the main environment: a second copy of it would be 5 GB.
.venv-types/installed: .venv/installed-dev
	$(PYTHON) -m venv .venv-types
	.venv-types/bin/python -c "import pathlib, site; pathlib.Path(site.getsitepackages()[0], 'main.pth').write_text(str(next(pathlib.Path('.venv/lib').resolve().glob('python*/site-packages'))))"
	.venv-types/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --config-settings editable_mode=strict --editable .
	touch $@

# make demo   the whole line on generated scans, ends with a Dice table and a picture
# make test   installs what development needs and runs every test, the notebooks included, two at a time
# make check  lint, generated files and the quick tests, in two minutes
# make readme writes README.md from nbs/index.ipynb
# make bench  this package and nnU-Net side by side; ONLY=resample,step and CASES choose, DATA=folder says where the scans are
# make docs   every notebook as a page, in site/index.html
PYTHON ?= python3
V := .venv/bin

.PHONY: demo check test readme bench docs clean

demo: .venv/installed
	$(V)/autounet demo demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(V)/python -m pytest -n 2 --dist loadgroup

check: .venv/installed-dev
	$(V)/ruff check autounet_nb .ci
	$(V)/python .ci/generated.py
	$(V)/python .ci/limits.py
	OMP_NUM_THREADS=1 $(V)/python -m pytest -n 2 --dist loadgroup -m 'not slow and not gpu'

readme: .venv/installed-dev
	$(V)/python .ci/readme.py

DATA ?= $(firstword $(wildcard data ../shared/data) data)
bench: .venv/installed-dev
	$(V)/python benchmarks/bench.py --data '$(DATA)' --only '$(ONLY)' --cases '$(CASES)'
	$(V)/nbdev-test nbs/tutorials/92_speed.ipynb --save
	$(V)/nbdev-clean

docs: .venv/installed
	$(V)/python -m pip install --quiet -e '.[docs]'
	$(V)/mkdocs build --quiet

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: install Python 3.10 or newer, or say which one with 'make PYTHON=…'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is older: say which one with 'make PYTHON=…'."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "Python's venv module is missing: install it (on Debian and Ubuntu: python3-venv)."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py
	$(V)/python -m pip install --quiet -e .
	@touch $@

.venv/installed-dev: .venv/bin/python settings.ini setup.py
	$(V)/python -m pip install --quiet -e '.[dev]'
	@touch .venv/installed $@

clean:
	rm -rf .venv demo build site *.egg-info

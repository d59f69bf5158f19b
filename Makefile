# make serve      start the service (PRECISION=fp32 or fp16, HOST, PORT)
# make fleet      N servers (2) that share their jobs in a Redis or Valkey, behind HAProxy on PORT, on this computer
# make quick      lint, types, import rules and unit tests: two minutes, needs what make serve installs
# make test       install, check and run every test
# make test-NAME  the tests of one folder: unit, model, http, browser, slow, deployment, benchmarks
# make image-test build both Docker images and run them (needs Docker; half an hour at first)
# make pythons    unit tests and make serve of the last commit with each installed Python from 3.10 to 3.13 (PYTHONS), a .venv for each
# make bench      compare this project with plain diffusers and BentoML's batching on the demo model: about 40 minutes
# make soak       half an hour (MINUTES) of mixed load and faults; memory must stay flat and every request get its response
# make check      lint, format, types, import rules and spelling only
# make format     fix lint errors and format the code
# make docs       generate the tables in docs/ from the code
# make audit      list known vulnerabilities of the packages that a bento installs (asks PyPI)
# make model      download a model (MODEL=v1.4, v1.5, 2.1, sdxl, sd-turbo, sdxl-turbo, lcm or owner/name; PRECISION=fp32 or fp16)
# make demo       train the demo model again, from scratch
# make demo-xl    train the demo XL model again, from the demo model
# make demo-adapters  train its LoRAs and its textual inversion again
# make lock       resolve the pinned dependencies again

PRECISION ?= fp32
MODEL ?= v1.4
HOST ?= 127.0.0.1
PORT ?= 3000
PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
MINUTES ?= 30
N ?= 2

UV_VERSION := 0.13.9
BIN := $(CURDIR)/.venv/bin
# Python compiles a module when it is first imported and caches the result; compiling everything here would take longer.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet --no-compile
INSTALL_TOOLS := .venv/tools/bin/pip install --disable-pip-version-check --quiet --no-compile
INSTALLED := .venv/installed
TOOLS_INSTALLED := .venv/tools/installed
# The schema of the AWS provider that bentoctl/aws-ec2 is written for (6.25), as text: tests check our Terraform against it.
AWS_PROVIDER_SCHEMA := cdktf-cdktf-provider-aws==21.22.1
# What to try: the loopback address instead of "all addresses"; brackets around an IPv6 address (RFC 3986, 3.2.2); a key if there are keys.
SERVER = $(patsubst 0.0.0.0,127.0.0.1,$(patsubst ::,::1,$(HOST)))
ADDRESS = http://$(if $(findstring :,$(SERVER)),[$(SERVER)],$(SERVER)):$(PORT)
KEY_HEADER = $(if $(strip $(value SD_API_KEYS)$(value SD_API_KEYS_FILE)), -H 'Authorization: Bearer KEY')
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
CODE := stable_diffusion fp32/service.py fp16/service.py tests benchmarks bentoctl/aws-ec2 docs/tables.py
PROSE := $(wildcard *.md */*.md) Makefile

# Run the checks while the test tools are being installed.
MAKEFLAGS += --jobs=2

# By default BentoML and the hub's client report usage to their makers.
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_DISABLE_TELEMETRY := 1
# PyFilesystem, which BentoML uses, prints this warning at every start.
export PYTHONWARNINGS := ignore:pkg_resources is deprecated:UserWarning

.PHONY: serve fleet quick test image-test pythons on-this-python bench soak check format docs audit model demo demo-xl demo-adapters lock precision

$(INSTALLED): requirements.txt requirements-runtime.txt requirements.lock bentoctl/aws-ec2/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(INSTALL) --requirement requirements.txt --constraint requirements.lock
	@touch $@

$(TOOLS_INSTALLED): requirements-tools.txt requirements-tools.lock $(INSTALLED)
	$(PYTHON) -m venv .venv/tools
	$(INSTALL_TOOLS) --requirement requirements-tools.txt --constraint requirements-tools.lock
	$(BIN)/pip download --disable-pip-version-check --quiet --no-deps --dest .venv/aws-provider-schema $(AWS_PROVIDER_SCHEMA)
	@touch $@

precision:
	@case "$(PRECISION)" in fp32|fp16) ;; *) echo "PRECISION must be fp32 or fp16, got $(PRECISION)" >&2; exit 2;; esac

serve: precision $(INSTALLED)
	@echo "When the server is ready, try$(if $(KEY_HEADER), (KEY is your API key)):"
	@echo "  curl -X POST '$(ADDRESS)/txt2img'$(KEY_HEADER) -H 'Content-Type: application/json' \\"
	@echo "       -d '{\"prompt\":\"a small red circle on a blue background\"}' --output output.jpg"
	@echo "or open $(ADDRESS)/ui in a browser. Ctrl+C stops it."
	@cd $(PRECISION) && BENTOML_CONFIG=configuration.yaml exec $(BIN)/bentoml serve service:svc --production --host $(HOST) --port $(PORT)

fleet: precision $(INSTALLED)
	@$(BIN)/python -m benchmarks.fleet --servers $(N) --port $(PORT) --precision $(PRECISION)

quick: check
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

# Two test files at a time, each with half of the cores; then, one by one, the tests that measure time.
test: check $(TOOLS_INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m 'not image and not alone'
	$(BIN)/python -m pytest -m alone

test-%: $(TOOLS_INSTALLED)
	$(BIN)/python -m pytest tests/$*

image-test: $(INSTALLED)
	$(BIN)/python -m pytest -m image tests/image

# Each clone has its own .venv of several gigabytes, which is removed afterwards.
pythons:
	@passed=; failed=; commit=$$(git rev-parse --short HEAD); \
	for python in $(PYTHONS); do \
	  "$$python" -c pass 2>/dev/null || { echo "$$python does not run here"; continue; }; \
	  folder=$$(mktemp -d); \
	  if git clone --quiet . "$$folder" && git -C "$$folder" checkout --quiet --detach $$commit && \
	    $(MAKE) --directory "$$folder" PYTHON="$$python" on-this-python; \
	  then passed="$$passed $$("$$python" --version)"; else failed="$$failed $$("$$python" --version)"; fi; \
	  rm -rf "$$folder"; \
	done; \
	echo "Commit $$commit on $$(date +%F). Passed:$${passed:- none}. Failed:$${failed:- none}."; \
	[ -n "$$passed" ] && [ -z "$$failed" ]

on-this-python: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) tests/unit
	$(BIN)/python -m pytest tests/http/test_readme.py -k make_serve

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.plot benchmarks/results/table.json

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

check: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(CODE) $(PROSE) --skip '*.json,*/model/*' --ignore-words-list alph,caf,iif,regio,te
	$(BIN)/pip check

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(INSTALLED)
	$(BIN)/python -m docs.tables

# --strict: a package that cannot be looked up is an error.
audit: $(TOOLS_INSTALLED)
	.venv/tools/bin/pip-audit --strict --no-deps --disable-pip --desc off --requirement requirements-runtime.lock

model: precision $(INSTALLED)
	$(BIN)/python -m stable_diffusion.models.download $(PRECISION) '$(MODEL)' $(PRECISION)/models

demo: $(INSTALLED)
	$(BIN)/python -m stable_diffusion.demo.train

demo-xl: $(INSTALLED)
	$(BIN)/python -m stable_diffusion.demo.train_xl

demo-adapters: $(INSTALLED)
	$(BIN)/python -m stable_diffusion.demo.train_adapters

lock: $(INSTALLED)
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	for name in requirements-runtime requirements requirements-tools; do \
	  $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock" $$name.txt --output-file $$name.lock; \
	done

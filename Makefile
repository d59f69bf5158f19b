# make serve      start the service (PRECISION=fp32 or fp16, HOST, PORT)
# make quick      lint, types, import rules and unit tests: two minutes, needs what make serve installs
# make test       install, check and run every test
# make test-NAME  the tests of one folder: unit, model, http, browser, slow, deployment, benchmarks
# make image-test build both Docker images and run them (needs Docker; half an hour at first)
# make bench      this project against plain diffusers and BentoML's batching on the demo model: about 40 minutes
# make soak       half an hour of mixed load and faults: memory flat, every request answered (MINUTES)
# make check      lint, format, types, import rules and spelling only
# make format     rewrite the files as the linter wants them
# make docs       write the tables in docs/ from the code
# make audit      known advisories of what a bento installs (asks PyPI)
# make model      download Stable Diffusion v1.4 (PRECISION=fp32 or fp16)
# make demo       train the demo model again, from nothing
# make lock       resolve the pinned dependencies again

PRECISION ?= fp32
HOST ?= 127.0.0.1
PORT ?= 3000
PYTHON ?= python3
MINUTES ?= 30

UV_VERSION := 0.13.9
BIN := $(CURDIR)/.venv/bin
# Python compiles what is imported when it is imported, and keeps that; compiling all of it here takes longer.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet --no-compile
INSTALL_TOOLS := .venv/tools/bin/pip install --disable-pip-version-check --quiet --no-compile
INSTALLED := .venv/installed
TOOLS_INSTALLED := .venv/tools/installed
# The schema of the AWS provider that bentoctl/aws-ec2 is written for (6.25), as text: tests hold our Terraform against it.
AWS_PROVIDER_SCHEMA := cdktf-cdktf-provider-aws==21.22.1
WEIGHTS := $(if $(filter fp16,$(PRECISION)),fp16/models/v1_4_fp16,fp32/models/v1_4)
# An IPv6 address stands in brackets in a URL (RFC 3986, 3.2.2).
ADDRESS = http://$(if $(findstring :,$(HOST)),[$(HOST)],$(HOST)):$(PORT)
PARALLEL := --numprocesses 2 --dist loadfile
CODE := stable_diffusion fp32/service.py fp16/service.py tests benchmarks bentoctl/aws-ec2 docs/tables.py
PROSE := $(wildcard *.md */*.md) Makefile

# The checks run while the tools of the tests are installed.
MAKEFLAGS += --jobs=2

# BentoML and the hub's client report usage to their makers unless told not to.
export BENTOML_DO_NOT_TRACK := True
export HF_HUB_DISABLE_TELEMETRY := 1
# PyFilesystem, of which BentoML is made, says so at every start.
export PYTHONWARNINGS := ignore:pkg_resources is deprecated:UserWarning

.PHONY: serve quick test image-test bench soak check format docs audit model demo lock precision

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
	@case "$(PRECISION)" in fp32|fp16) ;; *) echo "PRECISION is fp32 or fp16, not $(PRECISION)" >&2; exit 2;; esac

serve: precision $(INSTALLED)
	@echo "When the server is ready, try:"
	@echo "  curl -X POST '$(ADDRESS)/txt2img' -H 'Content-Type: application/json' \\"
	@echo "       -d '{\"prompt\":\"a small red circle on a blue background\"}' --output output.jpg"
	@echo "or open $(ADDRESS)/ui in a browser. Ctrl+C stops it."
	@cd $(PRECISION) && BENTOML_CONFIG=configuration.yaml exec $(BIN)/bentoml serve service:svc --production --host $(HOST) --port $(PORT)

quick: check
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

# First what waits more than it computes, two files at a time; then what computes, file by file.
test: check $(TOOLS_INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/deployment
	$(BIN)/python -m pytest --ignore tests/unit --ignore tests/deployment

test-%: $(TOOLS_INSTALLED)
	$(BIN)/python -m pytest tests/$*

image-test: $(INSTALLED)
	$(BIN)/python -m pytest -m image tests/image

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

# --strict: what cannot be looked up is an error, not a package without advisories.
audit: $(TOOLS_INSTALLED)
	.venv/tools/bin/pip-audit --strict --no-deps --disable-pip --desc off --requirement requirements-runtime.lock

model: precision $(INSTALLED)
	$(BIN)/python -m stable_diffusion.models.download $(PRECISION) $(WEIGHTS)

demo: $(INSTALLED)
	$(BIN)/python -m stable_diffusion.demo.train

lock: $(INSTALLED)
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	for name in requirements-runtime requirements requirements-tools; do \
	  $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock" $$name.txt --output-file $$name.lock; \
	done

VENV ?= .venv
OUT ?= demo
PYTHON ?= python3
DIGITS = models/digits

.PHONY: demo test

# Quantize a shipped model with its shipped data and print the report.
demo: $(VENV)/installed
	mkdir -p $(OUT)
	$(VENV)/bin/onnxq quantize models/residual.onnx -o $(OUT)/residual.int8.onnx \
	  --data $(DIGITS)_calibration.npz --eval $(DIGITS)_evaluation.npz --force

# Everything that runs by default; .ci/run runs more.
test: $(VENV)/installed-dev
	$(VENV)/bin/pytest -n auto

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet -e ".[dev]"
	touch $@

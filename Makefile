# Two commands on a fresh machine: `make demo` and `make test`. They need Python 3.10+, a C and C++
# compiler and make; everything else goes into .venv (building llama.cpp takes a few minutes).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find runtime convert evaluate serve bulk cli kernels nano -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

.PHONY: demo test lint sanitize fuzz golden clean

demo: $(VENV)/installed
	@echo '$$ pocketphi run -p "What is the capital of France?"' && \
	  $(BIN)/pocketphi run -p "What is the capital of France?"
	@echo && echo '$$ pocketphi run --image nano/eval/images/img-012.png -p "What does the text say?"' && \
	  $(BIN)/pocketphi run --image nano/eval/images/img-012.png -p "What does the text say?"
	@echo && echo '$$ pocketphi transcribe nano/eval/audio/asr-003.flac' && \
	  $(BIN)/pocketphi transcribe nano/eval/audio/asr-003.flac
	@echo && echo '$$ pocketphi run --image nano/eval/images/vs-003.png --audio nano/eval/audio/vs-003.flac' && \
	  $(BIN)/pocketphi run --image nano/eval/images/vs-003.png --audio nano/eval/audio/vs-003.flac
	@echo && echo '$$ pocketphi live --file nano/eval/audio/asr-001.flac --realtime' && \
	  $(BIN)/pocketphi live --file nano/eval/audio/asr-001.flac --realtime
	@echo && echo '$$ pocketphi chat   (three questions piped in)' && \
	  printf '%s\n' 'Hello!' 'What is 3 plus 4?' 'How many legs does a spider have?' | $(BIN)/pocketphi chat

test: $(VENV)/dev lint sanitize
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing/pocketphi && mkdir -p build/typing/pocketphi && ln -sfn ../../../runtime build/typing/pocketphi/runtime && \
	  ln -sfn ../../../convert build/typing/pocketphi/convert && ln -sfn ../../../cli build/typing/pocketphi/cli && \
	  ln -sfn ../../../evaluate build/typing/pocketphi/evaluate && \
	  ln -sfn ../../../serve build/typing/pocketphi/serve && ln -sfn ../../../bulk build/typing/pocketphi/bulk && touch build/typing/pocketphi/__init__.py
	cd build/typing && MYPYPATH=. ../../$(BIN)/python -m mypy --strict --config-file ../../pyproject.toml -p pocketphi

# The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every variant against the scalar reference, then the
# plug-in inside ggml, in a package of links. Python itself leaks; what the plug-in may leave, test_plugin_safety.py counts.
# With -O0, GCC's AVX-512 intrinsics are macros that warn.
SAFE := build/sanitize/python/pocketphi
sanitize: $(VENV)/dev
	$(BIN)/cmake -S . -B build/sanitize -DPK_SANITIZE=ON -DPK_WERROR=ON -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_C_FLAGS_DEBUG='-g -O1'
	$(BIN)/cmake --build build/sanitize
	cd build/sanitize && ../../$(BIN)/ctest --output-on-failure
	@rm -f $(SAFE)/cli.py && mkdir -p $(SAFE)/lib && ln -sfn $(CURDIR)/runtime $(CURDIR)/convert $(CURDIR)/evaluate $(CURDIR)/serve $(CURDIR)/bulk $(CURDIR)/nano $(CURDIR)/cli $(SAFE)/ && \
	  ln -sfn $(CURDIR)/build/sanitize/libpk*.so $(SAFE)/lib/ && \
	  cp "$$($(BIN)/python -c 'import pocketphi; print(pocketphi.__file__)')" $(SAFE)/__init__.py
	@if [ "$$(uname)" = Linux ]; then echo "pytest under the sanitizers" && PYTHONPATH=build/sanitize/python \
	  LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest -q tests/kernels/test_ggml_*.py tests/test_ggml_plugin.py; fi

# Hostile input to the kernels and to every reader of files, FUZZ_SECONDS for each target; `make test` has a short run.
FUZZ_SECONDS ?= 300
fuzz: $(VENV)/dev
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

# Made by transformers; see tests/golden/README.md.
golden: $(VENV)/dev
	$(BIN)/pip install --quiet '.[reference]'
	for part in make_golden logmel.make_golden speech.make_speech vision.make_vision; do \
	  $(BIN)/python -m tests.golden.$$part; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install .
	@touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/pip install --quiet '.[dev,hub,eval,serve,fuzz]' cmake ninja
	@touch $@

clean:
	rm -rf build $(VENV)

# SPDX-License-Identifier: Apache-2.0
# make run: train the example;  make test: all tests;  both start from nothing but Python, pip and a C compiler.
PYTHON ?= python3
BUILD ?= build
WARNINGS = -Wall -Wextra -Wconversion -Wshadow -Wvla -Werror
FLAGS_plain = -O2
FLAGS_asan = -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
FLAGS_tsan = -O1 -fsanitize=thread

LIBRARY = $(notdir $(wildcard csrc/*.c))
C_TESTS = $(basename $(notdir $(wildcard tests/c/test_*.c)))
C_FILES = $(wildcard csrc/*.[ch] tests/c/*.[ch] combiner/*.[ch])
PACKAGE = $(wildcard csrc/*.[ch] combiner/*.[ch] third_party/xla/ffi/api/*.h) pyproject.toml setup.py
BIN = .venv/bin

build: .venv/installed

run: build
	$(BIN)/python examples/train_bytes.py

test: test-c .venv/test
	$(BIN)/python -m pytest

test-slow: .venv/test # the sweeps that `make test` leaves out, and every float32 that 2^x takes
	$(BIN)/python -m pytest -m slow
	$(MAKE) $(BUILD)/plain/test_kernels
	$(BUILD)/plain/test_kernels --exhaustive

bench: .venv/bench $(BUILD)/plain/test_kernels
	$(BIN)/python benchmarks/run.py

gallery: build # the pictures of docs/patterns.md
	$(BIN)/python docs/gallery.py

lint: .venv/lint
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/lint
	$(BIN)/clang-format -i $(C_FILES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(BUILD) .venv *.egg-info combiner/*.so

# Some systems have venv without ensurepip: then their pip brings the environment's own.
.venv/bin/python:
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $@ install pip; }

.venv/installed: $(PACKAGE) | .venv/bin/python
	$(BIN)/python -m pip install -e '.[run]'
	touch $@

# What else an extra of pyproject.toml asks for, without building the package again.
.venv/bench .venv/lint .venv/test: .venv/installed
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*project["optional-dependencies"]["$(@F)"], sep="\n")' | $(BIN)/python -m pip install -r /dev/stdin
	touch $@

# The C tests, once plain and once for each sanitizer.
each = @set -e; for test in $(filter $(BUILD)/%,$^); do echo "== $$test"; $(1) $$test; done

test-c: $(C_TESTS:%=$(BUILD)/plain/%) test-header
	$(call each)

sanitize: $(C_TESTS:%=$(BUILD)/asan/%) $(C_TESTS:%=$(BUILD)/tsan/%)
	$(call each,TSAN_OPTIONS=die_after_fork=0:halt_on_error=1)

# valgrind knows no AVX-512, and unless it is told lets one thread starve the others; what a forked child lost with the
# parent's threads is not a leak.
valgrind: $(C_TESTS:%=$(BUILD)/plain/%)
	$(call each,COMBINER_ISA=avx2 valgrind -q --fair-sched=try --error-exitcode=1 --leak-check=full \
	    --show-leak-kinds=definite$(,)indirect --errors-for-leak-kinds=definite$(,)indirect)

test-header: # strict C11, and C++ where the compiler knows it
	$(CC) -std=c11 -pedantic $(WARNINGS) -Icsrc -fsyntax-only tests/c/test_header.c
	@! echo | $(CC) -x c++ -fsyntax-only - 2>/dev/null || \
	    $(CC) -x c++ -std=c++11 -pedantic -Wall -Wextra -Werror -Icsrc -fsyntax-only tests/c/test_header.c

, := ,
vpath %.c csrc tests/c
define flavour
$(BUILD)/$(1)/%.o: %.c
	@mkdir -p $$(@D)
	$$(CC) -std=gnu11 -g $$(FLAGS_$(1)) $$(WARNINGS) -Icsrc -MMD -c $$< -o $$@
$(C_TESTS:%=$(BUILD)/$(1)/%): $(BUILD)/$(1)/%: $(BUILD)/$(1)/%.o $(LIBRARY:%.c=$(BUILD)/$(1)/%.o)
	$$(CC) $$(FLAGS_$(1)) $$^ -o $$@ -lm -lpthread
endef
$(foreach name,plain asan tsan,$(eval $(call flavour,$(name))))
-include $(wildcard $(BUILD)/*/*.d)

.PHONY: build run test test-slow bench gallery lint format clean test-c sanitize valgrind test-header

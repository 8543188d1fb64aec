# SPDX-License-Identifier: Apache-2.0
# make run: train the example;  make test: all tests;  both start from nothing but Python, pip and a C compiler.
PYTHON ?= python3
BUILD ?= build
SECONDS ?= 60
MINUTES ?= 10
WARNINGS = -Wall -Wextra -Wconversion -Wshadow -Wvla -Werror
FLAGS_plain = -O3 -fPIC
FLAGS_asan = -O1 -DCMB_ASSERTS -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
FLAGS_tsan = -O1 -DCMB_ASSERTS -fsanitize=thread
FLAGS_asan-ext = $(FLAGS_asan) -fPIC -fvisibility=hidden
FLAGS_tsan-ext = $(FLAGS_tsan) -fPIC -fvisibility=hidden

BINDING = $(basename $(notdir $(wildcard combiner/binding/*.c)))
LIBRARY = $(patsubst csrc/%,%,$(wildcard csrc/*/*.c))
C_TESTS = $(basename $(notdir $(wildcard tests/c/test_*.c)))
C_FILES = $(wildcard csrc/*.h csrc/*/*.[ch] tests/c/*.[ch] combiner/binding/*.[ch] examples/*.c)
PACKAGE = $(wildcard csrc/*.h csrc/*/*.[ch] combiner/binding/*.[ch] third_party/xla/ffi/api/*.h) pyproject.toml setup.py
PYTHON_FILES = $(wildcard combiner/*.py combiner/*/*.py)
BIN = .venv/bin

build: .venv/installed

lib: $(BUILD)/libcombiner.a $(BUILD)/libcombiner.so # for C programs, from csrc alone: link with -lm -lpthread

run: build
	$(BIN)/python -m combiner demo

# First what judges seconds, then all else on two cores.
test: test-c .venv/test
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist loadfile

test-slow: .venv/test # the sweeps that `make test` leaves out, and every float32 argument of e^x
	$(BIN)/python -m pytest -m slow
	$(MAKE) $(BUILD)/plain/test_kernels
	$(BUILD)/plain/test_kernels --exhaustive

fuzz: .venv/test # random problems against the reference; SEED=n for those of an earlier run
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) $(SEED:%=--seed %)

soak: .venv/test # a million small calls, threads, forks and interrupts, or as many as there is time for
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

digests: .venv/test # the bits of some 700 calls on every instruction set; AGAINST=file of those printed before
	@$(BIN)/python tests/digests.py $(AGAINST:%=--against %)

# Into dist/. The wheel must use nothing beyond the stable ABI and old system libraries, and work with what it brings
# along, and nothing else; with the oldest NumPy too, where there is one for this Python.
wheel: .venv/test .venv/audit
	rm -rf dist $(BUILD)/wheel $(BUILD)/wheel-oldest
	$(BIN)/python -m build
	@test $$(cat dist/*.whl | wc -c) -lt 1500000 || { echo "the wheel has debug information"; exit 1; }
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python -m pip install -q --target $(BUILD)/wheel dist/*.whl
	$(call try_wheel,$(BUILD)/wheel)
	! $(BIN)/python -m pip install -q --target $(BUILD)/wheel-oldest --only-binary numpy numpy==1.26.0 dist/*.whl || \
	    $(call try_wheel,$(BUILD)/wheel-oldest)

bench: .venv/bench $(BUILD)/plain/test_kernels
	$(BIN)/python benchmarks/run.py

gallery: build # the pictures of docs/patterns.md and docs/looking.md
	$(BIN)/python docs/gallery.py

# The pages of docs/ as a site; every warning is an error, and nothing is downloaded.
docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -j auto -d $(BUILD)/doctrees docs $(BUILD)/docs
	@echo "$(BUILD)/docs/index.html"

notebooks: .venv/docs # runs those of docs/notebooks, two at a time; WRITE=1 keeps what they print and draw
	$(BIN)/python -m pytest -q --nbmake -n 2 $(WRITE:1=--overwrite) docs/notebooks

lint: .venv/lint
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github

format: .venv/lint
	$(BIN)/clang-format -i $(C_FILES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(BUILD) dist .venv *.egg-info combiner/*.so

define try_wheel
cd $(1) && $(CURDIR)/$(BIN)/python -IS -c 'import sys; sys.path.append("."); import combiner, numpy; \
    x = numpy.ones((2, 9, 4)); assert (combiner.attention(x, x, x, combiner.Fixed(4)) == 1).all(); \
    print(combiner.__file__, numpy.__version__, combiner.info())'
endef

# Some systems have venv without ensurepip: then their pip brings the environment's own.
.venv/bin/python:
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $@ install pip; }

.venv/installed: $(PACKAGE) | .venv/bin/python
	$(BIN)/python -m pip install -e '.[run]'
	touch $@

# What else an extra of pyproject.toml asks for, without building the package again.
.venv/audit .venv/bench .venv/docs .venv/lint .venv/systems .venv/test: .venv/installed
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*project["optional-dependencies"]["$(@F)"], sep="\n")' | $(BIN)/python -m pip install -r /dev/stdin
	touch $@

# The C tests, once plain and once for each sanitizer; make -j2 runs two at a time.
RUN_tsan = TSAN_OPTIONS=die_after_fork=0:halt_on_error=1
# valgrind knows no AVX-512, and unless it is told lets one thread starve the others; what a forked child lost with the
# parent's threads is not a leak.
RUN_valgrind = COMBINER_ISA=avx2 valgrind -q --fair-sched=try --error-exitcode=1 --leak-check=full \
    --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect

test-c: $(C_TESTS:%=run-plain-%) test-header test-lib
sanitize: $(C_TESTS:%=run-asan-%) $(C_TESTS:%=run-tsan-%)
valgrind: $(patsubst %,run-valgrind-%,$(filter-out $(SKIP),$(C_TESTS))) # without the tests that SKIP names

# The extension under sanitizers, which its process has to load first. Python holds blocks of its own when it ends, and
# asks for more memory than there is.
fuzz-core: $(BUILD)/asan-ext/combiner/_core.abi3.so # every function of the extension, with hostile arguments
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" PYTHONMALLOC=malloc PYTHONPATH=$(BUILD)/asan-ext \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(BIN)/python tests/fuzz_core.py --seconds $(SECONDS)

tsan-ext: $(BUILD)/tsan-ext/combiner/_core.abi3.so # the extension's threads beside Python's
	echo race:_dl_deallocate_tls >$(BUILD)/tsan-ext/suppressed # glibc, which takes an ended thread's locals for the next
	LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so)" PYTHONPATH=$(BUILD)/tsan-ext \
	    TSAN_OPTIONS=halt_on_error=1:suppressions=$(BUILD)/tsan-ext/suppressed \
	    $(BIN)/python tests/race_threads.py --seconds $(SECONDS)

test-header: # strict C11, and C++ where the compiler knows it; and that -ffast-math is refused
	@! $(CC) -ffast-math -Icsrc -fsyntax-only -x c csrc/kernels/kernels.h 2>/dev/null
	$(CC) -std=c11 -pedantic $(WARNINGS) -Icsrc -fsyntax-only tests/c/test_header.c
	@! echo | $(CC) -x c++ -fsyntax-only - 2>/dev/null || \
	    $(CC) -x c++ -std=c++11 -pedantic -Wall -Wextra -Werror -Icsrc -fsyntax-only tests/c/test_header.c

# A C program with either library, and with csrc as it is, without a line of configuration.
test-lib: lib
	$(CC) $(WARNINGS) examples/attention.c -Icsrc $(BUILD)/libcombiner.a -o $(BUILD)/attention -lm -lpthread
	$(BUILD)/attention
	$(CC) $(WARNINGS) examples/attention.c -Icsrc -L$(BUILD) -lcombiner -o $(BUILD)/attention -lm
	LD_LIBRARY_PATH=$(BUILD) $(BUILD)/attention
	rm -rf $(BUILD)/unconfigured && mkdir -p $(BUILD)/unconfigured
	cd $(BUILD)/unconfigured && $(CC) -c $(CURDIR)/csrc/*/*.c -I$(CURDIR)/csrc && \
	    $(CC) $(CURDIR)/examples/attention.c -I$(CURDIR)/csrc *.o -o attention -lm -lpthread && ./attention

# Other systems (make windows, arm64, musl, macos) are flavours of the same objects, too.
include systems/systems.mk

vpath %.c csrc tests/c
define flavour
$(BUILD)/$(1)/%.o: %.c | $$(SETUP_$(1))
	@mkdir -p $$(@D)
	$$(or $$(CC_$(1)),$$(CC)) -std=gnu11 -g $$(FLAGS_$(1)) $$(WARNINGS) -Icsrc -MMD -MP -c $$< -o $$@
$(C_TESTS:%=$(BUILD)/$(1)/%): $(BUILD)/$(1)/%: $(BUILD)/$(1)/%.o $(LIBRARY:%.c=$(BUILD)/$(1)/%.o)
	$$(or $$(CC_$(1)),$$(CC)) $$(FLAGS_$(1)) $$^ -o $$@ -lm -lpthread
endef
$(foreach name,plain asan tsan asan-ext tsan-ext $(SYSTEMS),$(eval $(call flavour,$(name))))

$(BUILD)/libcombiner.a: $(LIBRARY:%.c=$(BUILD)/plain/%.o)
	rm -f $@
	$(AR) rcs $@ $^
$(BUILD)/libcombiner.so: $(LIBRARY:%.c=$(BUILD)/plain/%.o)
	$(CC) -shared $(FLAGS_plain) $^ -o $@ -lm -lpthread

INCLUDE = $$($(BIN)/python -c 'import numpy, sysconfig; \
    print("-isystem", sysconfig.get_path("include"), "-isystem", numpy.get_include())')
define extension
$(BINDING:%=$(BUILD)/$(1)/binding/%.o): $(BUILD)/$(1)/binding/%.o: combiner/binding/%.c | .venv/installed $$(NEEDS_$(1))
	@mkdir -p $$(@D)
	$$(or $$(CC_$(1)),$$(CC)) -std=gnu11 -g $$(FLAGS_$(1)) -Wall -Wextra -Werror -Icsrc -isystem third_party \
	    -MMD -MP -c $$< -o $$@ -DNPY_NO_DEPRECATED_API=NPY_1_23_API_VERSION -DBUILD_NUMPY_VERSION='"of $(1)"' \
	    -DPy_LIMITED_API=0x030B0000 $$(or $$(INCLUDE_$(1)),$$(INCLUDE))
$(BUILD)/$(1)/combiner/$(or $(MODULE_$(1)),_core.abi3.so): $(BINDING:%=$(BUILD)/$(1)/binding/%.o) \
        $(LIBRARY:%.c=$(BUILD)/$(1)/%.o) $(PYTHON_FILES)
	@mkdir -p $$(@D)
	tar -c -C combiner $(PYTHON_FILES:combiner/%=%) | tar -x -C $$(@D)
	$$(or $$(CC_$(1)),$$(CC)) -shared $$(FLAGS_$(1)) $$(filter %.o,$$^) -o $$@ -lm -lpthread $$(LINK_$(1))
endef
$(foreach name,asan-ext tsan-ext $(filter-out musl,$(SYSTEMS)),$(eval $(call extension,$(name))))

define runs # the tests of a flavour, and how they are run
.PHONY: $(C_TESTS:%=run-$(2)-%)
$(C_TESTS:%=run-$(2)-%): run-$(2)-%: $(BUILD)/$(1)/%
	@echo "== $(2) $$(<F)"
	@$$(RUN_$(2)) $$< $$(ARGUMENTS_$(2)-$$(<F))
endef
$(eval $(call runs,plain,plain))
$(eval $(call runs,asan,asan))
$(eval $(call runs,tsan,tsan))
$(eval $(call runs,plain,valgrind))
$(foreach name,windows arm64 musl,$(eval $(call runs,$(name),$(name))))
$(foreach name,windows arm64,$(eval $(call suite,$(name))))
-include $(wildcard $(BUILD)/*/*.d $(BUILD)/*/*/*.d)

.PHONY: build lib run test test-slow digests fuzz soak wheel bench gallery docs notebooks lint format clean test-c \
        sanitize valgrind test-header test-lib fuzz-core tsan-ext

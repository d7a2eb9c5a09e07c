# Every target sets up what it needs by itself: from a clean clone it takes a Python >= 3.11 and a C++ compiler.
#   make demo    trains a small mixture-of-experts model on four processes
#   make test    all tests; make lint, make bench and make clean say what they do
#   make check   for while you work: what finds most faults in less than three minutes
#   make docs    the site of docs/, in build/docs
#   make wheel   what a release ships: dist/*.whl with every backend that can be built here, CUDA's without any CUDA
#   make test-maxtext  tests of ep_moe inside MaxText, which it installs
#   make test-rocm  tests on a simulated AMD GPU, which make rocm-sim sets up and builds (as root, Debian 12)
# ARGS is passed on: make demo ARGS="--ranks 2"

PYTHON = $(shell tools/find-python 3.11)
NEWEST_PYTHON := $(shell tools/find-python 3.12 2>/dev/null)
JOBS ?= 2
ARGS ?=
BIN := .venv/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports, which is little of what is installed.
export PIP_COMPILE := 0
# Options of pip that leave the GPUs' libraries out; CUDA's takes minutes where there is an nvcc.
CPU_ONLY := -C cmake.define.MORIEP_BUILD_CUDA=OFF -C cmake.define.MORIEP_BUILD_ROCM=OFF
# Programs that tests compiled, for the next run: tests/conftest.py.
export JAX_MORIEP_TEST_CACHE ?= $(CURDIR)/build/test-cache
# What is tested is this checkout, whatever the caller's shell would import.
unexport PYTHONPATH

.PHONY: demo bench test test-alone test-beside check test-cpp build-cpp test-gpu test-newest test-maxtext rocm-sim \
  test-rocm lint docs build wheel clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/jax-moriep demo $(ARGS)

bench: build
	$(BIN)/jax-moriep bench $(or $(ARGS),layer)

# These count seconds until a process that is gone is missed, and mostly wait: they share the machine with each other
# and with the tests on the newest jax, which give way to them. The parallel part comes last, so that the output ends
# with its summary. The tests of a file share what they compile or build; the longest files do not come last, where a
# worker would be left with one while the others have nothing to do.
ALONE := tests/multiprocess/test_launch.py tests/multiprocess/test_native.py tests/multiprocess/test_two_level.py
FIRST := tests/packaging tests/multiprocess tests/unit
PARALLEL := $(FIRST) $(filter-out $(FIRST) tests/rocm tests/maxtext %__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
test: build test-cpp
	$(MAKE) --no-print-directory -j2 --output-sync=recurse test-alone test-beside
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore %) $(PARALLEL)

test-alone:
	$(BIN)/pytest -n $(JOBS) $(ALONE)

test-beside:
	nice -n 10 $(MAKE) --no-print-directory test-newest

# For while you work: style, the arrows between modules, the pages, what is refused and how, routes, plans and
# parameters, and the native transport's contract. Chosen by their CPU seconds, of which all have some 170.
CHECK_UNIT := cli delivery errors hf_config hosts mori_limits mori_tuning nodes params plan quant routing stats version
CHECK := $(addprefix tests/contract/,test_exchange.py test_layer.py) $(CHECK_UNIT:%=tests/unit/test_%.py) \
  $(filter-out %/test_wheel.py,$(wildcard tests/packaging/test_*.py))
CHECK_NOT := finite_differences or test_code_runs or (contract and not native)
check: build .venv/.lint
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -k "not ($(CHECK_NOT))" $(CHECK)

# The C++ tests as they ship, then with every memory access and every data race checked.
SANITIZERS := none address thread
test-cpp: build-cpp
	@for sanitizer in $(SANITIZERS); do \
	  $(BIN)/ctest --test-dir build/test-$$sanitizer --output-on-failure --no-tests=error || exit 1; \
	done

build-cpp: .venv/.ready
	@for sanitizer in $(SANITIZERS); do \
	  $(BIN)/cmake -S . -B build/test-$$sanitizer -G Ninja --log-level=WARNING -DMORIEP_BUILD_LIBRARY=OFF \
	    -DMORIEP_BUILD_TESTS=ON -DMORIEP_BUILD_CUDA=OFF -DMORIEP_SANITIZER=$$sanitizer \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  && $(BIN)/cmake --build build/test-$$sanitizer || exit 1; \
	done

# What needs a GPU and its compiler, and so is no part of `make test`. GPU=rocm is for AMD's, with MORI in jobs of one
# process for each GPU, and with the whole comparison of this machine at the end (HOST= leaves it out).
GPU ?= cuda
HOST ?= $(if $(filter rocm,$(GPU)),--minutes 9)
JOB_TESTS := $(addprefix tests/contract/,test_exchange.py test_layer.py test_transforms.py)
test-gpu: build
	$(BIN)/cmake -S . -B build/test-$(GPU) -G Ninja --log-level=WARNING -DMORIEP_BUILD_LIBRARY=OFF \
	  -DMORIEP_BUILD_TESTS=ON -DMORIEP_BUILD_CUDA=$(if $(filter cuda,$(GPU)),ON,OFF) \
	  -DMORIEP_BUILD_ROCM=$(if $(filter rocm,$(GPU)),ON,OFF) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/test-$(GPU) --target $(GPU)_exchange_test $(GPU)_expand_test $(GPU)_wire_test \
	  $(GPU)_speed $(GPU)_peer
	build/test-$(GPU)/csrc/gpu/$(GPU)/$(GPU)_exchange_test
	build/test-$(GPU)/csrc/gpu/$(GPU)/$(GPU)_expand_test
	build/test-$(GPU)/csrc/gpu/$(GPU)/$(GPU)_wire_test
	build/test-$(GPU)/csrc/gpu/$(GPU)/$(GPU)_speed
	build/test-$(GPU)/csrc/gpu/$(GPU)/$(GPU)_peer
	JAX_MORIEP_TEST_PLATFORM=$(GPU) $(BIN)/pytest tests/gpu tests/contract
	JAX_MORIEP_TEST_PLATFORM=$(GPU) JAX_MORIEP_NATIVE_DISPATCH=put $(BIN)/pytest tests/gpu tests/contract/test_exchange.py \
	  -k native
	$(if $(filter rocm,$(GPU)),$(BIN)/python -m tests.job --platform rocm $(JOB_TESTS) -k mori)
	$(if $(HOST),$(BIN)/jax-moriep bench host --platform $(GPU) --out build/test-$(GPU) $(HOST))

# The wheel on the newest jax that this machine's Python gets. The tests run away from the checkout, which they
# would import otherwise. The longest file is as long as all others, so its tests are shared. Of the transports
# those whose ways into jax differ: custom calls and collectives; two_level is made of both. How the order links
# exchanges concerns the custom calls alone.
NEWEST_TESTS := tests/contract/test_order.py tests/contract/test_transforms.py tests/lowering \
  tests/multiprocess/test_launch.py tests/unit/test_doctor.py tests/unit/test_flax.py tests/unit/test_hopper.py \
  tests/unit/test_hopper_fp8.py \
  tests/unit/test_interop.py
ifeq ($(NEWEST_PYTHON),)
test-newest:
	@echo "skipped: the tests with the newest jax, for there is no Python >= 3.12 on this machine"
else
test-newest: .venv-newest/.ready
	$(BIN)/pip wheel -qq --no-deps --no-build-isolation $(CPU_ONLY) -w build/newest-wheel .
	.venv-newest/bin/pip install -qq --no-deps --force-reinstall build/newest-wheel/jax_moriep-*.whl
	.venv-newest/bin/python -c "import jax; print('newest jax:', jax.__version__)"
	rm -rf build/newest && mkdir -p build/newest && cp -r tests pyproject.toml build/newest
	cd build/newest && ../../.venv-newest/bin/pytest -n $(JOBS) --dist worksteal \
	  -k "not reference and not two_level and not (test_order and collective)" $(NEWEST_TESTS)
endif

# ep_moe inside MaxText on eight devices of a CPU. MaxText and what it imports are 1.6 GB, so CI leaves this out.
# The tests run away from the checkout, as those of the newest jax do.
test-maxtext: .venv-maxtext/.ready
	$(BIN)/pip wheel -qq --no-deps --no-build-isolation -w build/maxtext-wheel .
	.venv-maxtext/bin/pip install -qq --no-deps --force-reinstall build/maxtext-wheel/jax_moriep-*.whl
	rm -rf build/maxtext && mkdir -p build/maxtext && cp -r tests pyproject.toml build/maxtext
	cd build/maxtext && ../../.venv-maxtext/bin/python -m pytest tests/maxtext $(ARGS)

.venv-maxtext/.ready: .venv/.ready tests/maxtext/requirements.txt
	@test -n "$(NEWEST_PYTHON)" || { echo "MaxText needs a Python >= 3.12, and there is none on this machine"; exit 1; }
	$(NEWEST_PYTHON) -m venv .venv-maxtext
	.venv-maxtext/bin/pip install -qq --no-deps -r tests/maxtext/requirements.txt
	@touch $@

# A simulated MI300X for the real XLA ROCm client and the real amd-mori: tests/rocm/simulator/README.md.
rocm-sim:
	@test -n "$(PYTHON)"
	JOBS=$(JOBS) tests/rocm/simulator/tools/build $(PYTHON)

# A simulated device takes one core. The tests of a file share what they compile, so they stay together.
test-rocm: rocm-sim
	.venv-rocm/bin/ctest --test-dir build/rocm-sim --output-on-failure
	.venv-rocm/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests/rocm $(ARGS)

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	git ls-files 'csrc/*.cc' 'csrc/*.h' 'tests/rocm/*.cc' 'tests/rocm/*.h' | xargs $(BIN)/clang-format --dry-run -Werror

# The site, with warnings as errors: a link to a page, a heading or a file that is not there is one, and so is a
# docstring that cannot be read. Sphinx imports the package from the checkout, where nothing needs to be built.
docs: .venv-docs/.ready
	rm -rf build/docs
	.venv-docs/bin/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees . build/docs
	@echo build/docs/index.html

.venv-docs/.ready: constraints.txt
	@test -n "$(PYTHON)"
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -qq -c constraints.txt furo myst-parser sphinx absl-py flax jax
	@touch $@

# An editable install imports the checkout; only its library needs a build when a source changes.
build: .venv/.ready
	@$(BIN)/cmake --build build/editable

# The libraries for the CPU, for CUDA with NVIDIA's compiler from PyPI (104 MB), and for ROCm where its compiler is.
# In an environment of its own, as a user's; the first variable is for pip before 25.3, the second for later ones.
wheel: .venv/.ready
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(BIN)/pip wheel -q --no-deps -C cuda.toolkit=pypi -w dist .

.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt csrc/CMakeLists.txt csrc/gpu/CMakeLists.txt $(wildcard cmake/*)
	@test -n "$(PYTHON)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq -c constraints.txt scikit-build-core cmake ninja jaxlib
	$(BIN)/pip install -qq -c constraints.txt --no-build-isolation -e '.[flax,plot,test]'
	@touch $@

.venv/.lint: .venv/.ready
	$(BIN)/pip install -qq -c constraints.txt --no-build-isolation -e '.[lint]'
	@touch $@

.venv-newest/.ready: .venv/.ready
	$(NEWEST_PYTHON) -m venv .venv-newest
	awk -F== 'sub(/^#newest /, "") { print; taken[$$1]; next } /^[A-Za-z]/ && !($$1 in taken)' constraints.txt \
	  > .venv-newest/constraints.txt
	.venv-newest/bin/pip install -qq -c .venv-newest/constraints.txt \
	  jax flax optax orbax-checkpoint flatbuffers pytest pytest-timeout pytest-xdist
	@touch $@

clean:
	rm -rf .venv .venv-docs .venv-newest .venv-maxtext .venv-rocm build dist jax_moriep/lib .pytest_cache .ruff_cache

# make train_gpt [NORM=LNS] [DEVICE=cuda|cpu] [PRECISION=bf16|fp32] [DEBUG=1] [CUDA_ARCHS="80 90"]
# make help lists the rest. Every combination is built in its own folder, build/DEVICE-PRECISION-NORM; ./train_gpt is a
# link to the one built last. Sources are compiled once for all NORMs, in build/DEVICE-PRECISION: what NORM decides is one
# constant, trainer/norm.cpp, which a program is linked with.
MAKEFLAGS += --no-builtin-rules
SHELL := /bin/bash
.DEFAULT_GOAL := train_gpt
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: train_gpt trainer tokenize help norms deps data demo test test-sanitized fuzz bench kernel-report cuda_variants clean format \
    FORCE do-data do-demo build-tests build-other-trainers do-test do-fuzz do-bench

comma := ,
hash := \#
one_of = $(if $(filter 1,$(words $($(1)))),$(filter $(2),$($(1))))
check_choice = $(if $(call one_of,$(1),$(2)),,$(error $(1)=$($(1)) is unknown; it is one of: $(2)))

# --- What to build: NORM, DEVICE, PRECISION, DEBUG -------------------------------------------------------------------

NORMS := $(subst $(comma),,$(shell sed -n 's/^enum class Norm { \(.*\) };.*/\1/p' trainer/norm.h))
NORM ?= LNS
$(call check_choice,NORM,$(NORMS))

NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
# The architectures of the GPUs that are there and not too old; nothing where the driver does not answer.
gpus := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | grep -xE '[89].|1..' | sort -nu)
ifdef DEVICE
  why := as asked
else ifeq ($(NVCC),)
  DEVICE := cpu
  why := no nvcc on PATH or in /usr/local/cuda/bin
else ifeq ($(gpus),)
  DEVICE := cpu
  why := nvcc is here, but no usable GPU; DEVICE=cuda builds for one elsewhere
else
  DEVICE := cuda
  why := nvcc and a GPU are here
endif
$(call check_choice,DEVICE,cuda cpu)
PRECISION ?= $(if $(filter cuda,$(DEVICE)),bf16,fp32)
$(call check_choice,PRECISION,bf16 fp32)
CUDA_ARCHS ?= $(or $(gpus),80 90)
debug := $(filter-out 0,$(DEBUG))
mode := $(if $(debug),-debug)
variant := $(DEVICE)-$(PRECISION)-$(NORM)$(mode)

# --- Compilers and libraries -----------------------------------------------------------------------------------------

ifeq ($(origin CXX),default)
  CXX := g++
endif
MPICXX ?= mpicxx

# Goals that install what is missing start a second make when that is done, so that the look-ups below succeed.
outer := help norms deps data demo test test-sanitized fuzz bench kernel-report cuda_variants clean format
ifneq ($(filter-out $(outer),$(or $(MAKECMDGOALS),train_gpt)),)
  mpi_compile := $(patsubst -I%,-isystem %,$(shell $(MPICXX) --showme:compile 2>/dev/null)) -DOMPI_SKIP_MPICXX=
  mpi_link := $(shell $(MPICXX) --showme:link 2>/dev/null)
  headers := mpi.h CLI/CLI.hpp toml++/toml.h nlohmann/json.hpp pcre2.h utf8proc.h zlib.h zstd.h \
      $(if $(filter cpu,$(DEVICE)),oneapi/dnnl/dnnl.hpp)
  missing := $(strip $(shell for header in $(headers); do \
      printf '$(hash)if !__has_include(<%s>)\n%s\n$(hash)endif\n' $$header $$header; done | \
      $(CXX) $(mpi_compile) -DPCRE2_CODE_UNIT_WIDTH=8 -x c++ -E -P - 2>&1; true))
  ifneq ($(missing),)
    $(error missing: $(missing); run make deps)
  endif
  ifeq ($(DEVICE)$(NVCC),cuda)
    $(error DEVICE=cuda needs nvcc, on PATH or in /usr/local/cuda/bin; DEVICE=cpu does without)
  endif
endif

# Never -ffast-math: it removes the checks for NaN.
# -Wrestrict is wrong about std::string + in GCC 12.
warnings := -Wall -Wextra -Wno-restrict
optimize := $(if $(debug),-O1 -g -fno-var-tracking -fno-omit-frame-pointer,-O3)
sanitize := $(if $(debug),-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined)
defines := -I. $(mpi_compile) $(if $(debug),-DDEBUG)
dependencies = -MMD -MP -MF $(@:.o=.d)
precisions := fp32 bf16
precision_bf16 := -DPRECISION_BF16

cxx = $(CXX) -std=c++20 $(optimize) -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp \
    $(warnings) $(sanitize) $(defines) $(dependencies)
# -Wno-psabi: functions on g++'s vectors are inlined, so that no ABI is involved.
cuda_on_cpu = $(cxx) -x c++ -fno-extern-tls-init -Wno-unknown-pragmas -Wno-psabi -Idev/cpu $(if $(debug),-DCPU_DEVICE_DEBUG)
# Programs for speed: a block is one thread that works on g++'s vectors, not 32 lanes as on a GPU. Kernels are compiled
# into the loops over their blocks, where g++ would otherwise take shared memory for that of another module.
fast_form := -DCPU_DEVICE_FAST -ftls-model=local-exec
fast := $(if $(debug),,$(fast_form))
# nvcc takes one -O, that of the code for the host.
nvcc = $(NVCC) -std=c++20 $(if $(debug),-g -lineinfo) $(if $(filter -O%,$(NVCC_FLAGS)),,$(if $(debug),-O1,-O3)) \
    --expt-relaxed-constexpr -Xcompiler -Wall,-Wextra \
    $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch)$(comma)code=sm_$(arch)) $(NVCC_FLAGS) $(defines) \
    $(dependencies)

link = $(CXX) $(if $(filter build/cuda-%,$@),,$(sanitize)) -fopenmp $(filter %.o,$^) -o $@
tokenizer_libs := -lpcre2-8 -lutf8proc -lz
text_libs := $(tokenizer_libs) -lzstd -pthread
cpu_libs = -ldnnl -lboost_context $(tokenizer_libs) $(mpi_link) -ldl -pthread
cuda_home := $(abspath $(dir $(realpath $(NVCC)))/..)
cuda_libs = $(foreach lib,$(wildcard $(cuda_home)/lib64 $(cuda_home)/lib),-L$(lib) -Wl$(comma)-rpath$(comma)$(lib)) \
    -lcublasLt -lnccl -lcudart $(tokenizer_libs) $(mpi_link) -ldl -pthread

# --- The programs ----------------------------------------------------------------------------------------------------

train_gpt: build/$(variant)/train_gpt
	@ln -sfn $< train_gpt
	@echo "./train_gpt is $< (DEVICE=$(DEVICE): $(why))"

# For scripts: prints where it is, and leaves the link ./train_gpt alone.
trainer: build/$(variant)/train_gpt
	@echo $<

tokenize: build/tokenize

parts := build/parts$(mode)
device_objects := $(patsubst %.cpp,$(parts)/%.o,$(wildcard dev/cpu/*.cpp))
text_objects := $(patsubst %.cpp,$(parts)/%.o,$(filter-out tokenizer/tokenize.cpp,$(wildcard tokenizer/*.cpp)))
bpe_objects := $(patsubst %,$(parts)/tokenizer/%.o,bpe pretokenize unicode)
host_objects := $(bpe_objects) \
    $(patsubst %,$(parts)/%.o,tokenizer/conversation tokenizer/json_text trainer/command_line trainer/toml)
# Of programs for a GPU, which may be taken to a machine with another CPU.
portable := build/parts-portable$(mode)
portable_objects := $(patsubst $(parts)/%,$(portable)/%,$(host_objects))

$(parts)/dev/cpu/%.o: dev/cpu/%.cpp Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(cuda_on_cpu) -c $< -o $@

$(parts)/%.o: %.cpp Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(cxx) -c $< -o $@

$(portable)/%.o: %.cpp Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(filter-out -march=native $(sanitize),$(cxx)) -c $< -o $@

build/bench$(mode)/%: $(parts)/dev/bench/%.o $(bpe_objects)
	@mkdir -p $(@D)
	$(link) $(tokenizer_libs) -pthread

build/tokenize$(mode): $(parts)/tokenizer/tokenize.o $(text_objects)
	$(link) $(text_libs)
ifdef mode
build/tokenize: build/tokenize$(mode) ; @ln -sfn $(<F) $@
endif

build/norms/%.o: trainer/norm.cpp Makefile
	@mkdir -p $(@D)
	$(filter-out -march=native $(sanitize),$(cxx)) -DNORM=$* -c $< -o $@

# $(1) the program's name, $(2) its source, $(3) its libraries, $(4) flags on a CPU; $(precision)
define program
build/cpu-$(precision)$(mode)/$(1).o: $(2) Makefile
	@mkdir -p $$(@D); echo 'compile $$@'
	$$(cuda_on_cpu) $(precision_$(precision)) $(4) -c $$< -o $$@
build/cuda-$(precision)$(mode)/$(1).o: $(2) Makefile build/cuda-$(precision)$(mode)/flags
	@mkdir -p $$(@D); echo 'compile $$@'
	$$(nvcc) $(precision_$(precision)) -c $$< -o $$@
build/cpu-$(precision)-%$(mode)/$(1): build/cpu-$(precision)$(mode)/$(1).o build/norms/%.o $(device_objects) $(host_objects)
	@mkdir -p $$(@D)
	$$(link) $(3) $$(cpu_libs)
build/cuda-$(precision)-%$(mode)/$(1): build/cuda-$(precision)$(mode)/$(1).o build/norms/%.o $(portable_objects)
	@mkdir -p $$(@D)
	$$(link) $(3) $$(cuda_libs)
endef
programs = $(foreach precision,$(precisions),$(eval $(call program,$(1),$(2),$(3),$(4))))
benches := $(patsubst dev/bench/%.cu,%,$(wildcard dev/bench/*.cu))
$(call programs,train_gpt,train_gpt.cu,,$(fast))
$(call programs,train_gpt_quick,train_gpt.cu,,$(fast_form) -O1)
$(foreach test,test_kernels test_model test_train_gpt,$(call programs,$(test),test/$(test).cu,-lgtest -lgtest_main)\
    $(call programs,$(test)_fast,test/$(test).cu,-lgtest -lgtest_main,$(fast)))
$(foreach bench,$(benches),$(call programs,$(bench),dev/bench/$(bench).cu,,$(fast)))

# Programs that see what kernels read and write: dev/accesses/accesses.h. One access a line of source, as on a GPU, is what
# the optimizer must not undo.
accesses := -fsanitize=thread -Wno-tsan -g1 -O1 -fno-tree-sra -fno-tree-vectorize -fno-tree-slp-vectorize -DCPU_DEVICE_DEBUG
access_sources := test/test_races.cu dev/accesses/kernel_report.cu
define access_program
build/accesses/cpu-$(precision)/$(notdir $(1:.cu=)).o: $(1) Makefile
	@mkdir -p $$(@D); echo 'compile $$@'
	$$(cuda_on_cpu) $(precision_$(precision)) $$(accesses) -c $$< -o $$@
build/accesses/cpu-$(precision)-%/$(notdir $(1:.cu=)): build/accesses/cpu-$(precision)/$(notdir $(1:.cu=)).o build/norms/%.o \
    build/parts/dev/accesses/accesses.o $(device_objects) $(host_objects)
	@mkdir -p $$(@D)
	$$(link) $(if $(filter test/%,$(1)),-lgtest -lgtest_main) $$(cpu_libs)
endef
$(foreach source,$(access_sources),$(foreach precision,$(precisions),$(eval $(call access_program,$(source)))))
$(parts)/dev/accesses/%.o: dev/accesses/%.cpp Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(cuda_on_cpu) -c $< -o $@

build/cuda-%/flags: FORCE
	@mkdir -p $(@D); echo '$(CUDA_ARCHS) $(NVCC_FLAGS)' | cmp -s - $@ || echo '$(CUDA_ARCHS) $(NVCC_FLAGS)' >$@

# --- Data and the demonstration --------------------------------------------------------------------------------------

VOCAB ?= 4096
export TEXT VOCAB

deps:
	@scripts/setup.sh

# A second make, in which everything is installed.
again = @scripts/setup.sh && $(MAKE) --silent --no-print-directory -j$(shell nproc)

data demo bench:
	$(again) do-$@

# Does nothing when there are shards, but for TEXT="FILE...", which replaces them.
do-data: build/tokenize
	@set -e; \
	if [[ ! $$TEXT ]] && compgen -G 'data/train_*.bin' >/dev/null && compgen -G 'data/val_*.bin' >/dev/null; then exit; fi; \
	if [[ ! $$TEXT ]]; then scripts/prepare_data.py; TEXT=data/corpus; fi; \
	mkdir -p data && rm -f data/train_*.bin data/val_*.bin data/shards.json; \
	build/tokenize train --vocab-size $$VOCAB --out data/tokenizer.json $$TEXT; \
	build/tokenize encode --tokenizer data/tokenizer.json --out data --val-fraction 0.01 --shard-tokens 100M $$TEXT

do-demo: do-data
	@DEVICE=$(DEVICE) PRECISION=$(PRECISION) scripts/demo.py

do-bench: $(benches:%=build/$(variant)/%)
	@for bench in $^; do echo "== $$bench"; $$bench || exit 1; done
ifeq ($(DEVICE),cpu)
	@echo "== dev/bench/against_pytorch.py --precision $(PRECISION)"; \
	if python3 -c 'import torch' 2>/dev/null; then dev/bench/against_pytorch.py --precision $(PRECISION); \
	else echo "not run: python3 has no PyTorch (pip install torch)"; fi
endif

# --- Tests -----------------------------------------------------------------------------------------------------------
# `again` above builds in parallel; the programs run one after the other, since each uses all cores.

# A build that fails counts as a failed test.
test: MODE := DEVICE=$(DEVICE)
test-sanitized: MODE := DEVICE=cpu DEBUG=1
test test-sanitized:
	$(again) build-tests $(MODE) || { echo '0 passed, 1 failed'; exit 1; }
	@$(MAKE) --no-print-directory do-test $(MODE)

tests := build/tests$(mode)
plain_tests := $(patsubst test/%.cpp,$(tests)/%,$(wildcard test/test_*.cpp))
device_tests := $(patsubst test/%.cu,$(tests)/%,$(wildcard test/test_cpu_device.cu test/test_nccl.cu))
# test_train_gpt is test_kernels and test_model, which plans all NORMs at run time, with a kernel's form for a GPU; _fast is
# the other one. kernel_tests run in these orders, without the model's tests, which have a slash in their names.
model_tests := $(foreach precision,$(precisions),build/cpu-$(precision)-LNS$(mode)/test_train_gpt)
kernel_tests := $(model_tests)
orders := reverse shuffle:1
fast_tests := $(if $(debug),,$(foreach precision,$(precisions),build/cpu-$(precision)-LNS/test_train_gpt_fast))
gpu_tests := $(if $(filter cuda,$(DEVICE)),$(foreach precision,$(precisions),build/cuda-$(precision)-LNS/test_train_gpt))
access_tests := $(if $(debug),,$(foreach precision,$(precisions),build/accesses/cpu-$(precision)-LNS/test_races))
# Not under the sanitizers: tests that see accesses, which the compiler tells the one or the other; tests that kill, fill
# disks and wait for a watchdog, for which such programs are too slow; tests of scripts; the model in bf16, whose kernels
# are; the trainers of other NORMs, all of which test_model plans.
ifneq ($(debug),)
  model_tests := build/cpu-fp32-LNS$(mode)/test_train_gpt
  kernel_tests := build/cpu-bf16-LNS$(mode)/test_kernels
  orders := forward
endif
unsanitized_tests := $(addprefix test/test_,failures.sh resume.sh scripts.sh sweep.sh fetch.sh fetch_eval.sh tuning.sh)
# Side by side: those that train, and those that mostly wait. test_failures.sh has time limits, and runs alone.
script_tests := $(filter-out $(if $(debug),$(unsanitized_tests)),$(wildcard test/test_*.sh))
trainer_scripts := test/test_resume.sh test/test_train.sh
# The fast form's vectors, compiled for each level of x86-64 that has others, and run where this processor has it.
processor := $(if $(debug),,$(shell grep -m 1 ^flags /proc/cpuinfo))
vector_tests := $(patsubst %,build/%/test_floats,$(if $(processor),x86-64 x86-64-v3 x86-64-v4))
own_vector_tests := $(filter-out $(if $(filter avx2,$(processor)),,%v3/test_floats) \
    $(if $(filter avx512vl,$(processor)),,%v4/test_floats),$(vector_tests))
# The sanitized one has the kernels' fast form as well: in the other one scripts take four times as long.
trainer := build/cpu-fp32-LNS$(mode)/train_gpt$(if $(debug),_quick)
other_trainers := $(patsubst %,build/cpu-fp32-%/train_gpt,$(if $(debug),PRE POST,$(filter-out LNS,$(NORMS))))

$(parts)/test/%.o: test/%.cu Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(cuda_on_cpu) -c $< -o $@
$(tests)/test_tokenize $(tests)/test_tokenizer: $(tests)/%: $(parts)/test/%.o $(text_objects)
	@mkdir -p $(@D)
	$(link) -lgtest -lgtest_main $(text_libs)
$(device_tests): $(tests)/%: $(parts)/test/%.o $(device_objects)
	@mkdir -p $(@D)
	$(link) -lgtest $(if $(filter test_nccl,$(@F)),,-lgtest_main) $(cpu_libs)
build/x86-%/test_floats.o: test/test_floats.cu Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(filter-out -march=native,$(cuda_on_cpu)) -march=x86-$* -O1 $(fast_form) -c $< -o $@
build/x86-%/test_floats: build/x86-%/test_floats.o
	$(link) -lgtest -lgtest_main
$(tests)/test_%: $(parts)/test/test_%.o $(host_objects)
	@mkdir -p $(@D)
	$(link) -lgtest -lgtest_main $(tokenizer_libs) -pthread

mpirun := mpirun --allow-run-as-root --oversubscribe -np
# Open MPI itself leaks.
do-test: export ASAN_OPTIONS := detect_leaks=0
do-test: export TRAIN := $(trainer)
# What takes longest to compile comes first, so that no core waits for it at the end.
build-tests: $(model_tests) $(kernel_tests) $(fast_tests) $(access_tests) $(gpu_tests) $(trainer) $(plain_tests) $(device_tests) \
    $(vector_tests) build/tokenize $(if $(debug),build-other-trainers,$(other_trainers))
build-other-trainers:
	@$(MAKE) --silent --no-print-directory DEBUG=0 $(other_trainers)
do-test:
	@test/run_tests.sh \
	    $(foreach test,$(plain_tests) $(filter-out %/test_nccl,$(device_tests)) \
	        $(own_vector_tests),'$(test)') \
	    $(foreach test,$(filter %/test_nccl,$(device_tests)),$(foreach ranks,1 2 4,'$(mpirun) $(ranks) $(test)')) \
	    $(foreach order,$(orders),$(foreach test,$(kernel_tests),'CPU_DEVICE_ORDER=$(order) $(test) --gtest_filter=-*/*')) \
	    $(foreach test,$(fast_tests) $(access_tests) $(model_tests) $(gpu_tests) \
	        $(filter test/test_failures.sh,$(script_tests)),'$(test)') \
	    -- $(filter $(trainer_scripts),$(script_tests)) -- $(filter-out $(trainer_scripts) test/test_failures.sh,$(script_tests))

# Each dev/fuzz/NAME.cpp is a libFuzzer target with the tokenizer's library, dev/fuzz/corpus/NAME its seeds.
fuzz_targets := $(patsubst dev/fuzz/%.cpp,build/fuzz/%,$(wildcard dev/fuzz/*.cpp))
fuzz_objects := $(patsubst $(parts)/%,build/fuzz/parts/%,$(text_objects))
fuzz_cxx = $(CLANGXX) -std=c++20 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -I. $(dependencies) \
    -fno-sanitize-recover=undefined -fsanitize=address,undefined
CLANGXX ?= clang++

build/fuzz/parts/%.o: %.cpp Makefile
	@mkdir -p $(@D); echo 'compile $@'
	$(fuzz_cxx)$(comma)fuzzer-no-link -c $< -o $@
build/fuzz/%: build/fuzz/parts/dev/fuzz/%.o $(fuzz_objects)
	$(CLANGXX) -fsanitize=address,undefined,fuzzer $^ -o $@ $(text_libs)

fuzz:
	@scripts/setup.sh clang libclang-rt-dev
	$(again) do-fuzz || { echo '0 passed, 1 failed'; exit 1; }
	@dev/fuzz/run.sh $(fuzz_targets)
do-fuzz: $(fuzz_targets)

# What a step would take on GPUs, and that no kernel moves more than it should. JSON=1 writes what the recipes read instead.
kernel_report := build/accesses/cpu-bf16-LNS/kernel_report
kernel-report:
	$(again) DEVICE=cpu DEBUG=0 $(kernel_report)
	@$(kernel_report) $(if $(JSON),--json dev/bench/kernel_report.json)

cuda_variants:
	@scripts/cuda_check.sh

# --- Housekeeping ----------------------------------------------------------------------------------------------------

help:
	@echo 'make train_gpt [NORM=$(subst $() ,|,$(NORMS))] [DEVICE=cuda|cpu] [PRECISION=bf16|fp32] [DEBUG=1]'
	@echo 'make demo            the main job end to end: data, PRE and LNS trained side by side, a picture'
	@echo 'make test            all tests that this machine can run; make test-sanitized: under address and UB sanitizers'
	@echo 'make fuzz            every target of dev/fuzz for FUZZ_SECONDS=30'
	@echo 'make data            sample corpus, tokenizer and shards in data/; TEXT="FILE..." takes your text, VOCAB=$(VOCAB)'
	@echo 'make tokenize        build/tokenize'
	@echo 'make deps            installs what is missing (SETUP=skip: nothing)'
	@echo 'make cuda_variants   every NORM and PRECISION by nvcc, checked for spills; make bench: dev/bench; make format; make clean'
	@echo 'make kernel-report   what each kernel moves over its floor, and the time a step takes by that on A100 and H100'

norms:
	@echo $(NORMS)

clean:
	rm -rf build train_gpt

format:
	clang-format -i $(shell git ls-files '*.cu' '*.cuh' '*.h' '*.cpp')

-include $(wildcard build/*/*.d build/parts*/*/*.d build/parts*/dev/*/*.d build/accesses/*/*.d build/fuzz/parts/*/*.d build/fuzz/parts/dev/fuzz/*.d)

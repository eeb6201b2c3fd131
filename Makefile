# `make up`: a whole cluster on this machine. `make test`: everything CI runs. `make cuda`: the program for GPUs. See README.md.
.PHONY: up test build cuda cuda-kernels release clean

QUESTION ?= What is in this picture?
IMAGE ?= tests/fixtures/media/photo.jpg

# Builds, starts router, encoder and a decoder group of two ranks, asks one question about a real
# photograph, and stays up until Ctrl-C.
up: build
	./target/debug/tessera up --image "$(IMAGE)" --ask "$(QUESTION)" $(ARGS)

build:
	@deploy/setup.sh build
	cargo build --locked --workspace

# Format, lints, layer rules, all Rust tests, then the Python clients against a running cluster.
test:
	@deploy/setup.sh test
	cargo xtask ci

# The program with the CUDA backend. Needs no GPU and no CUDA on this machine: the compiler comes as Python wheels.
cuda:
	@deploy/setup.sh build
	@deploy/cuda-toolkit.sh
	cargo build --locked --package tessera --features cuda

# What each kernel takes of a multiprocessor, as the assembler says it.
cuda-kernels: cuda
	@{ sed '/^| file/,$$d' docs/benchmarks/cuda-kernels.md; ./target/debug/tessera gpus --kernels; } >target/cuda-kernels.md
	@mv target/cuda-kernels.md docs/benchmarks/cuda-kernels.md

# `make release CUDA=1` has the CUDA backend too.
release:
	@deploy/setup.sh build
	$(if $(CUDA),@deploy/cuda-toolkit.sh)
	cargo build --locked --release --package tessera $(if $(CUDA),--features cuda)

clean:
	cargo clean
	rm -rf .venv

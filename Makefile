# `make up`: a whole cluster on this machine. `make test`: everything CI runs. See README.md.
.PHONY: up test build release clean

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

release:
	@deploy/setup.sh build
	cargo build --locked --release --package tessera

clean:
	cargo clean
	rm -rf .venv

# Every target says what it does; a failure says what to do. `make` alone lists them.
#
#   BERTH_TOOLS   directory to keep built tools in between runs (.cache/tools)
#   FUZZ_SECONDS  how long make fuzz runs each target (60)
#   NODES         how many nodes the cluster of make test-cluster has (1)

SHELL := /bin/sh
MUSL := $(shell uname -m)-unknown-linux-musl
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help deps build images demo demo-programs test test-unit test-rootful test-kubelet test-kubelet-peer test-node test-cluster
.PHONY: conformance fuzz test-vm vm-shell bench deb test-deb clean
.PHONY: lint lint-format lint-code lint-docs lint-dependencies
# Cargo and the Go peers use every core by themselves.
.NOTPARALLEL:

help:
	@echo 'make deps          install what building and testing need (Debian packages; root)'
	@echo 'make build         dist/berthd, dist/berth, dist/berth-shim'
	@echo 'make demo          a pod of two containers on a private daemon, then cleaned up (root)'
	@echo 'make test          every test (root), with the counts at the end'
	@echo 'make test-unit     the tests of each crate'
	@echo 'make test-rootful  the real daemon over its socket (root)'
	@echo 'make test-kubelet  a real kubelet on the real daemon (root)'
	@echo 'make test-node     every kind of pod of a real kubelet, restarts of the daemon under them (root)'
	@echo 'make test-kubelet-peer  the same on containerd, to check the test (root)'
	@echo 'make test-cluster  Deployments, Jobs and more of a Kubernetes cluster on the real daemon (root)'
	@echo 'make test-cluster NODES=3  several nodes on this machine, with kube-proxy and DNS, on each kind of network (root)'
	@echo 'make conformance   critest, the conformance suite of the CRI, on the real daemon (root)'
	@echo 'make fuzz          hostile bytes for what reads streams of exec and port forwarding; FUZZ_SECONDS each'
	@echo 'make test-vm       the package on a node with systemd and cgroup v2, and its restarts, in a virtual machine (root)'
	@echo 'make vm-shell      a shell in that machine (root)'
	@echo 'make deb           dist/berth_VERSION_amd64.deb'
	@echo 'make test-deb      that package installed, upgraded, removed and purged in a Debian of its own (root)'
	@echo 'make bench         Berth beside containerd with runc (root)'
	@echo 'make lint          format, clippy, docs, dependencies'
	@echo 'make clean         remove what was built'

deps:
	@echo '== what building and testing need'
	@scripts/install-needs build demo test bench vm deb

# The shim is built apart: static, and with a profile for size.
build:
	@echo '== building dist/'
	@scripts/install-needs build
	@$(CARGO) build --locked --release --package berth-runtime --package berth-cli
	@$(CARGO) build --locked --profile shim --package berth-shim --target $(MUSL)
	@mkdir -p dist
	@install -t dist target/release/berthd target/release/berth target/$(MUSL)/shim/berth-shim
	@ls -l dist/berthd dist/berth dist/berth-shim | awk '{ printf "%9d KiB  %s\n", $$5 / 1024, $$9 }'

images:
	@scripts/install-needs demo
	@scripts/build-image demo

# Without a release in dist/, the programs are built by a quicker profile. Else that release is
# brought up to date and used.
demo: images
	@if [ -e dist/berthd ]; then $(MAKE) --no-print-directory build && scripts/demo; else \
		$(MAKE) --no-print-directory demo-programs && BERTH_BIN_DIR=target/demo-programs scripts/demo; fi

demo-programs:
	@echo '== building for the demo, without optimisation (make build makes the release)'
	@scripts/install-needs build
	@$(CARGO) build --locked --profile demo --package berth-runtime --package berth-cli
	@$(CARGO) build --locked --profile demo --package berth-shim --target $(MUSL)
	@install -D -t target/demo-programs target/demo/berthd target/demo/berth target/$(MUSL)/demo/berth-shim
	@install -D -m 644 -t target/demo-programs/images dist/images/demo.tar

test: build images
	@scripts/install-needs test
	@scripts/build-peer crictl cni streams kubelet kubelet-previous
	@scripts/run-tests unit rootful kubelet node

test-unit:
	@scripts/install-needs build test
	@scripts/run-tests unit

test-rootful: build images
	@scripts/install-needs test
	@scripts/build-peer crictl cni streams
	@scripts/run-tests rootful

test-kubelet: build images
	@scripts/install-needs test
	@scripts/build-peer kubelet kubelet-previous
	@scripts/run-tests kubelet

test-node: build images
	@scripts/install-needs test
	@scripts/build-peer kubelet
	@scripts/run-tests node

# Checks the test, not Berth: on containerd it has to pass as well.
test-kubelet-peer: images
	@scripts/install-needs test bench
	@scripts/build-peer kubelet containerd runc
	@scripts/run-tests kubelet-peer

NODES ?= 1
several := $(filter-out 1,$(NODES))

# Not part of `make test`: building Kubernetes takes minutes where it was not built before.
test-cluster: build images
	@scripts/install-needs test
	@scripts/build-peer etcd kubernetes kubelet $(if $(several),coredns cni)
	@BERTH_TEST_NODES=$(NODES) scripts/run-tests $(if $(several),nodes,cluster)

conformance: build
	@scripts/install-needs test
	@scripts/build-peer critest
	@scripts/run-tests conformance

FUZZ_SECONDS ?= 60

fuzz:
	@scripts/install-needs build
	@echo '== fuzzing'
	@scripts/fuzz $(FUZZ_SECONDS)

test-vm: build images
	@scripts/install-needs test vm
	@scripts/build-peer crictl critest kubelet
	@scripts/run-tests vm

vm-shell: build images
	@scripts/install-needs vm
	@scripts/vm shell

deb: build
	@packaging/build-deb

test-deb: deb images
	@scripts/install-needs deb
	@scripts/run-tests deb

bench: build images
	@scripts/install-needs bench
	@scripts/bench

lint: lint-format lint-code lint-docs lint-dependencies

lint-format:
	@scripts/install-needs build
	@echo '== format'
	@$(CARGO) fmt --all --check || { echo 'lint: run `cargo fmt --all`'; exit 1; }

lint-code:
	@scripts/install-needs build
	@echo '== clippy'
	@$(CARGO) clippy --workspace --all-targets --all-features --locked -- -D warnings

lint-docs:
	@scripts/install-needs build
	@echo '== documentation'
	@RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked

lint-dependencies:
	@scripts/install-needs build
	@echo '== dependencies'
	@scripts/check-dependencies

clean:
	@echo '== removing dist/ and target/ (tools and peers in .cache/ stay)'
	@rm -rf dist
	@$(CARGO) clean

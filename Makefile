# Every example, run as its first line says. Needs the package, and transformers for two of them, in the environment that is active.
.PHONY: examples
examples:
	@set -e; for file in examples/*.py; do \
	    command=$$(sed -n '1s/^# //p' $$file); echo "+ $$command"; OMP_NUM_THREADS=1 sh -ec "$$command"; \
	done

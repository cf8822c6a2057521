# Needs the package, and transformers for some of them, in the environment that is active.
.PHONY: examples docs

# Every example, run as its first line says.
examples:
	@set -e; for file in examples/*.py; do \
	    command=$$(sed -n '1s/^# //p' $$file); echo "+ $$command"; OMP_NUM_THREADS=1 sh -ec "$$command"; \
	done

# Every command of README.md and docs/, in the order in which they are read.
docs:
	@python docs/run_commands.py

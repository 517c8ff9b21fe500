"""XLA's flags for tests whose time is compilation: a training step compiles in a sixth of the time, to the same sums.

`make test` prints them and gives them to pytest; tests give them to the processes that they start.
"""

from importlib.metadata import version

# Without LLVM's optimizations. XLA's emitters for fused loops take twice as long as the ones before them; jaxlib 0.12
# has no others, and ends at a flag that it does not know.
_OLDER_EMITTERS = int(version("jaxlib").split(".")[1]) < 11
QUICK = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * _OLDER_EMITTERS

if __name__ == "__main__":
    print(QUICK)

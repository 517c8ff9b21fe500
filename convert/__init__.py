"""Converts between released PyTorch files and Orbax checkpoints, in both directions, and verifies the result.

to_orbax, to_hf, adapters, average, rehearse, verify    the commands
tensor_source        a checkpoint of either layout as released tensors, read in rows
orbax_files, safetensors_files, blocks    streaming: one piece in memory at a time
orbax_hooks          a leaf of an Orbax checkpoint written in pieces, by hooks of Orbax
check_checksums, compare_tensors, compare_models, pytorch_reference    the checks and comparisons of verify
model_card           README.md of a model that is to be published
staging, memory      directories that appear whole; memory of this process
"""

PYTORCH_INSTALL = "pip install torch 'transformers==4.57.1'"

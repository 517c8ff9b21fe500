"""Weights on disk and on devices.

checkpoint           load_model, save_model, load_adapter, merge_adapter
locate               a path -> the parts of the checkpoint there
names                the table between released tensors and our parameters
orbax                reads and writes the Orbax tree
checksums            checksums of parameters, on devices and in pieces
safetensors_reader   reads released files
peft                 reads and writes adapters in PEFT's layout
parameters           shapes and shardings by path; a model around parameters
info                 lists what a checkpoint holds
finite               finds NaN and infinity in weights
recognition          messages for a path that is no checkpoint
"""

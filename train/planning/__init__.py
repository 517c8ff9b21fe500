"""Memory and speed of a recipe on TPUs that need not be present; start at `plan`.

chips              compute, memory and network of each TPU generation
topology           names of TPU slices, and their devices to compile for
interconnect       links that a collective of a slice can use
flops              model FLOPs, recomputed FLOPs and memory traffic of a step
hlo                collectives, matmuls and HBM traffic of a compiled program
compilation        a traced function -> memory, collectives and matmuls, as compiled for a TPU
estimate           roofline estimate of step time and MFU
calibration        published measurements of similar models against that estimate
plan               the report of a training step, of generation, of loading: the command `plan`
plan_evaluation    the same for the evaluations within a training run
plan_reinforce     the same for a step of `reinforce`: its answers and its updates
plan_serving       the same for an engine
"""

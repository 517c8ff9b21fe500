"""What surrounds the steps of a run: its directory, checkpoints, reports, validation, and its processes.

directory          names of the files in a run's directory
model_directory    writes model/ of a run: configuration and tokenizer
config             options of resuming a run
config_file        reads and writes a run's config.json
checkpoints        saves and restores the state of a run
resume             a run's `config.json`, and which options may differ when it resumes
validation         evaluations while a run trains
best               the metric that runs are compared by, and the best checkpoint
preflight          checks of the training data before the first step
report             console, metrics.jsonl, TensorBoard and HTML report of a run
overview           one line that describes a run
figures            metrics of the data, from sums over all hosts
curves             plots of the metrics of several runs
profiling          traces of a few steps
distributed        several processes: start, agreement, the exit if one is lost
rendezvous         the processes of a run wait for each other at the start
watchdog           ends a process that hangs
"""

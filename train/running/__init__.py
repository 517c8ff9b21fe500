"""Everything of a run except its steps: directory, checkpoints, reports, validation and processes.

directory           names of the files in a run's directory
model_directory     writes model/ of a run: configuration and tokenizer
config              options of a start: where it resumes, its processes
config_file         reads and writes a run's config.json
beginning           files of a run, and the state that it starts or resumes from
between_steps       checkpoints, evaluations and the end of a run
checkpoints         saves and restores the state of a run
resume              record of a run in its config.json; which options may change when it resumes
additions           data that join a run: the example at which they begin
validation          evaluations during training
best                metrics that compare evaluations, and the best evaluation so far
preflight           checks of the training data before the first step
sizes               lengths of examples, and how well they fill sequences
report              metrics and scores of a run -> the sinks below
sink                base class of the sinks
progress            sink: lines on stderr
record_files        sink: metrics.jsonl and the other JSON lines, tables of answers
tensorboard         sink: event files
weights_and_biases  sink: a run in Weights & Biases
overview            one line that describes a run
figures             metrics of the data, from sums over all hosts
curves              plots of the metrics of several runs
profiling           traces of a few steps
distributed         several processes: initialization, communication, exit if one is lost
rendezvous          waits at the start until all processes have joined
watchdog            ends a process that hangs
"""

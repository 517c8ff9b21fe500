"""Names of the files and directories in the directory of a run.

    config.json         configuration of the run, versions and history (`resume`)
    model/              configuration and tokenizer of the model (`model_directory`)
    checkpoints/        checkpoints by step (`checkpoints`)
    ema, best           names of checkpoints, as in `RUN/best`; no files
    best.json           best evaluation so far
    metrics.jsonl ...   records of the run (`report`)
    figures/            pictures of the samples of evaluations
    profile/            traces
    profile_now         file that requests a trace
    damaged_checkpoints/, later_checkpoints/    checkpoints that were put aside

The names that `load_model` reads are those of `moss_audio_jax.weights.locate` (RUN_MODEL, RUN_CHECKPOINTS ...).
"""

from moss_audio_jax.storage.paths import AnyPath, to_path

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SCORES_FILE = "scores.jsonl"
SAMPLES_FILE = "samples.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
ANSWERS = "answers"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb_run.txt"
RECORDS = (METRICS_FILE, SCORES_FILE, SAMPLES_FILE, ROLLOUTS_FILE, ANSWERS, TENSORBOARD, WANDB_FILE)
FIGURES = "figures"
PROFILE, PROFILE_NOW = "profile", "profile_now"
DAMAGED, LATER = "damaged_checkpoints", "later_checkpoints"
STATE, DATA = "state", "data"  # items of a checkpoint, beside its parameters


def is_begun(out: AnyPath) -> bool:
    """Returns True if a directory holds a run with a checkpoint, which a start resumes."""
    from moss_audio_jax.weights.locate import locate_here

    return locate_here(out).params is not None and (to_path(out) / CONFIG_FILE).exists()

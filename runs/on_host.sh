#!/usr/bin/env bash
# What the other scripts run on a TPU VM, in its copy of this repository.
#
#     install             Python and the packages, in .venv
#     start COMMAND ...   `run` in the background, its output in train.log
#     run COMMAND ...     the command, and again as long as it only was interrupted
#     stop                ends it by SIGTERM: the command saves, and is not run again
set -euo pipefail
cd "$(dirname "$0")/.."

AGAIN=75                   # exit code of `moss-audio-train run`: preempted, or another host was lost
MISTAKE=2                  # what the message names and no repetition mends: an option, the data, a full disk
LONG=${LONG:-600}          # seconds after which any other end is taken for an interruption, such as JAX's own
TRIES=${TRIES:-5}          # ends in a row before LONG seconds, after which it is left
PAUSE=${PAUSE:-10}         # seconds, before it is run again

run() {
    local code began seconds child short=0 stopping=""
    export PATH="$PWD/.venv/bin:$PATH"
    trap 'stopping=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
    while true; do
        began=$SECONDS
        code=0
        "$@" &
        child=$!
        wait "$child" || code=$?
        while kill -0 "$child" 2>/dev/null; do # the signal has ended `wait`, not the command
            code=0
            wait "$child" || code=$?
        done
        seconds=$((SECONDS - began))
        echo "on_host: ended with $code after $seconds s"
        if [[ $seconds -ge $LONG ]]; then short=0; else short=$((short + 1)); fi
        if [[ $code -eq 0 || $code -eq $MISTAKE || -n $stopping ]] || [[ $code -ne $AGAIN && $seconds -lt $LONG ]]; then
            return "$code"
        fi
        if [[ $short -ge $TRIES ]]; then
            echo "on_host: $short ends in a row before $LONG s: not run again; see the messages above" >&2
            return "$code"
        fi
        sleep "$PAUSE"
        [[ -z $stopping ]] || return "$code"
    done
}

is_running() { [[ -f train.pid ]] && kill -0 "$(cat train.pid)" 2>/dev/null; }

what=${1:-}
shift || true
case $what in
install) # Ubuntu 22.04, as these machines have it, comes with Python 3.10
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -d .venv ]] || uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
    .venv/bin/python -c 'from importlib.metadata import version; print("installed: jax", version("jax"), "libtpu", version("libtpu"))'
    ;;
start)
    if is_running; then
        echo "$(hostname): already running; its output is in $PWD/train.log"
        exit 0
    fi
    setsid bash runs/on_host.sh run "$@" >>train.log 2>&1 </dev/null &
    echo $! >train.pid
    echo "$(hostname): started; its output is in $PWD/train.log"
    ;;
run)
    run "$@"
    ;;
stop)
    if is_running; then
        kill -TERM "$(cat train.pid)"
        echo "$(hostname): told to save and end; train.log says when it has"
    else
        echo "$(hostname): nothing is running"
    fi
    ;;
*)
    echo "error: bash $0 install | start COMMAND ... | run COMMAND ... | stop, not ${what:-nothing}" >&2
    exit 2
    ;;
esac

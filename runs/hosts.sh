# The verbs of the scripts that reach their hosts by SSH. Such a script sources this, defines
#
#     create, status, delete     what is rented
#     copy FILE                  into the home directory of every host
#     on_hosts COMMAND           on every host at once
#
# and ends with `verb "$@"`. DISTRIBUTED is --distributed where there may be more hosts than one.
#
# shellcheck shell=bash disable=SC2154 # config.sh sets what is used here

verb() {
    local what=${1:-}
    shift || true
    case $what in
    create | status | delete)
        "$what"
        ;;
    install) # what is committed here, and its packages; again after a change, it is quick
        local packed
        packed=$(mktemp -d)/moss-audio.tar.gz
        git -C "$REPO" archive --format=tar.gz --output="$packed" HEAD
        copy "$packed"
        on_hosts "mkdir -p moss-audio && tar -xzf moss-audio.tar.gz -C moss-audio && bash moss-audio/runs/on_host.sh install"
        ;;
    run)
        on_hosts "bash moss-audio/runs/on_host.sh start $(printf '%q ' "${TRAIN[@]}" "${DISTRIBUTED[@]}" "$@")"
        ;;
    logs)
        on_hosts "tail -n 40 moss-audio/train.log"
        echo "a line for every step: gcloud storage cat $RUN/metrics.jsonl"
        ;;
    stop) # saves first
        on_hosts "bash moss-audio/runs/on_host.sh stop"
        ;;
    *)
        echo "error: bash $0 create | status | install | run [OPTION ...] | logs | stop | delete, not ${what:-nothing}" >&2
        exit 2
        ;;
    esac
}

#!/usr/bin/env bash
# What launch/tpu.py runs on each TPU VM: install, running, start, follow, status, log, profile, stop.
set -euo pipefail

home=$HOME/dollar
mkdir -p "$home"
cd "$home"

# True while the started command, whose process id is also its group's, lives.
running() {
    [[ -f pid ]] && kill -0 "$(<pid)" 2>/dev/null
}

install_python() {
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    export PATH="$HOME/.local/bin:$PATH"
    # The images come with Python 3.10; JAX wants 3.11.
    uv venv --quiet --clear --python 3.11 venv
    uv pip install --quiet --python venv/bin/python -e 'src[tpu]'
}

# A bucket as the folder /bucket, so that every worker sees the same run.
mount_bucket() {
    mountpoint -q /bucket && return
    if ! command -v gcsfuse >/dev/null; then
        release=gcsfuse-$(lsb_release -c -s)
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt $release main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse
    fi
    sudo mkdir -p /bucket && sudo chown "$(id -u):$(id -g)" /bucket
    # On machines as large as these gcsfuse would remember a file's size and generation for ever, and one worker
    # would not see what another has written anew.
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=10 "$1" /bucket
}

case ${1:-} in
install) # COMMIT [BUCKET]
    if [[ -n ${3:-} ]]; then mount_bucket "$3"; fi
    if [[ -f commit && $(<commit) == "$2" ]]; then
        echo "$(hostname): $2 is installed"
        exit
    fi
    if running; then
        echo "$(hostname): another commit is running; stop it first" >&2
        exit 3
    fi
    rm -rf src commit
    mkdir src
    tar -xzf "$HOME/dollar.tar.gz" -C src
    install_python
    echo "$2" >commit
    echo "$(hostname): installed $2"
    ;;
running) # COMMAND...
    shift
    running || exit 6
    if [[ $(<job.txt) != "$*" ]]; then
        echo "$(hostname): something else is running: $(<job.txt)" >&2
        exit 3
    fi
    echo "$(hostname): running already"
    ;;
start) # COMMAND...
    shift
    printf '%s\n' "$*" >job.txt
    rm -f exit_code pid stopped
    # The variables of --env; they stay in the command's memory alone.
    if [[ -f $HOME/dollar.env ]]; then
        # shellcheck disable=SC1091
        source "$HOME/dollar.env"
        rm -f "$HOME/dollar.env"
    fi
    # In the shell's own session it would die with the connection. The command's exit code outlives it. With the
    # trap the shell, which SIGTERM reaches too, lives until the command has saved its checkpoint.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM; echo $$ >pid; cd src; PATH="$HOME/dollar/venv/bin:$PATH" "$@"; echo $? >../exit_code' \
        dollar "$@" >>log 2>&1 </dev/null &
    for _ in {1..50}; do
        [[ -s pid ]] && break
        sleep 0.1
    done
    echo "$(hostname): started"
    ;;
follow)
    [[ -f pid ]] || { echo "$(hostname): nothing was started" >&2; exit 3; }
    tail -n 200 -s 0.2 -F --pid="$(<pid)" log 2>/dev/null
    if [[ -f stopped ]]; then exit 8; fi
    [[ -f exit_code ]] || exit 4
    if [[ $(<exit_code) == 0 ]]; then exit; fi
    echo "$(hostname): ended with exit code $(<exit_code)" >&2
    # 143: SIGTERM came; 7: another process of the run died; 2: `dollar` refused its input, and would refuse it again.
    case $(<exit_code) in 143 | 7) exit 7 ;; 2) exit 9 ;; *) exit 5 ;; esac
    ;;
status)
    if running; then
        echo "$(hostname): running $(<job.txt)"
    elif [[ -f stopped ]]; then
        echo "$(hostname): stopped, nothing runs"
    elif [[ -f exit_code ]]; then
        echo "$(hostname): ended with exit code $(<exit_code)"
    else
        echo "$(hostname): nothing runs"
    fi
    ;;
log)
    [[ ! -f log ]] || cat log
    ;;
profile)
    running || { echo "$(hostname): nothing runs" >&2; exit 3; }
    # Only Python among the group listens for the signal; it would end the shells.
    pkill -USR1 -g "$(<pid)" -f 'bin/dollar train'
    ;;
stop)
    if running; then
        touch stopped
        kill -TERM -- "-$(<pid)"
        # It ends its step, which may take minutes, and saves a checkpoint first.
        timeout 1800 tail -s 0.1 -f --pid="$(<pid)" /dev/null || true
        if running; then kill -KILL -- "-$(<pid)"; fi
    fi
    rm -f pid
    echo "$(hostname): stopped"
    ;;
*)
    echo "usage: worker.sh install|running|start|follow|status|log|profile|stop" >&2
    exit 2
    ;;
esac

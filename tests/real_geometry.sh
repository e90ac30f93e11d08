#!/usr/bin/env bash
# From the documentation alone, for a tiny teacher at the real geometry: import, prepare, train with samples and a CLIP
# reward on 8 virtual devices and then on with two processes, sample, evaluate, export. Minutes on two cores.
#     bash tests/real_geometry.sh FOLDER [wan_1_3b|cogvideox_2b|cogvideox_5b [HEIGHT WIDTH [FRAMES]]]
set -euo pipefail
work=$(realpath -m "${1:?FOLDER}") name=${2:-wan_1_3b} height=${3:-480} width=${4:-832}
case $name in wan*) frames=5 ;; *) frames=9 ;; esac
frames=${5:-$frames}
cd "$(dirname "$0")/.."
mkdir -p "$work"
export JAX_PLATFORMS=cpu PYTHONPATH=$PWD JAX_COMPILATION_CACHE_DIR=$work/cache
say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
dollar() { python -m dollar_jax "$@"; }

say make
[ -d "$work/clips" ] || python tests/real_geometry.py "$work" "$name" "$height" "$width" "$frames"
say import
[ -d "$work/teacher" ] || dollar import "$work/hub" "$work/teacher"
say prepare
JAX_NUM_CPU_DEVICES=8 dollar prepare --source="$work/clips" --out="$work/data" --teacher="$work/teacher" \
    --frames="$frames" --height="$height" --width="$width" --max_text_length=12
train() {
    dollar train --config="$name:vsd+cd+lrm,clip=$work/clip" --workdir="$work/run" --config.teacher="$work/teacher" --config.data.name="$work/data" \
        --config.data.max_text_length=12 --config.batch_size=8 --config.reward.batch_size=8 --config.reward.replay=16 \
        --config.fake_score.updates=1 --config.sampling.num_steps=2 --config.visibility.samples_every=2 \
        --config.visibility.videos=2 --config.mesh.fsdp=4 --config.mesh.context=2 "$@"
}
say train on 8 devices
JAX_NUM_CPU_DEVICES=8 train --config.steps=2
say train on with two processes
port=$((20000 + RANDOM % 10000))
for i in 0 1; do
    JAX_NUM_CPU_DEVICES=4 train --config.steps=4 --coordinator_address=localhost:$port --num_processes=2 --process_id=$i &
done
wait -n
wait -n
say sample
JAX_NUM_CPU_DEVICES=8 dollar sample --workdir="$work/run" --prompt="a large red circle" --num=2 --out="$work/videos"
say evaluate
JAX_NUM_CPU_DEVICES=8 dollar evaluate --workdir="$work/run" --quick --reward=clip --reward_folder="$work/clip" \
    --out="$work/measures.json"
say export
dollar export --workdir="$work/run" "$work/exported"
say done

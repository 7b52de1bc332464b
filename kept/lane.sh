#!/bin/bash
# takes the next job of jobs.txt that nobody has, until there is none
cd CHECKOUT/build/intrinsics/code; . ENV; cd CHECKOUT
B=build/intrinsics
while true; do
  found=
  while read -r task kind seed flags; do
    [ -z "$task" ] && continue
    name=$task-$kind-$seed
    [ -f $B/$name/training.json ] && continue
    [ -f $B/$name.failed ] && continue
    exec 9>$B/$name.lock; flock -n 9 || continue
    found=1
    data="--data SHARED/data/$task/train.jsonl"
    [ -f build/data/$task/train.jsonl ] && data="--data build/data/$task/train.jsonl"
    [ $task = jailbreak ] && data="--data examples/data/jailbreak/train.jsonl --data examples/data/jailbreak/train_context.jsonl"
    [ $kind = alora ] && flags="$flags --prefix-cache $B/prefixes/$task --prefix-memory 5"
    start=$(date +%s)
    python -m alora_serve.cli.app train --recipe examples/recipes/$task.toml --kind $kind --seed $seed --output $B/$name $data --dtype bfloat16 --threads 1 $flags >$B/$name.log 2>&1 || touch $B/$name.failed
    echo "$name $(( $(date +%s) - start )) s" >>$B/done.txt
    break
  done < $B/jobs.txt
  [ -z "$found" ] && break
done

#!/bin/bash
# x.sh NAME TASK KIND SEED FLAGS: an exploration
cd CHECKOUT/build/intrinsics/code; . ENV; cd CHECKOUT; B=build/intrinsics
name=$1 task=$2 kind=$3 seed=$4; shift 4
data="--data SHARED/data/$task/train.jsonl"
[ -f build/data/$task/train.jsonl ] && data="--data build/data/$task/train.jsonl"
flags=; [ $kind = alora ] && flags="--prefix-cache $B/prefixes/$task --prefix-memory 6"
start=$(date +%s)
python -m alora_serve.cli.app train --recipe examples/recipes/$task.toml --kind $kind --seed $seed --output $B/x-$name $data --dtype bfloat16 --threads 1 $flags "$@" >$B/x-$name.log 2>&1
echo "x-$name $(( $(date +%s) - start )) s: $(grep validation $B/x-$name.log | tail -1)" >>$B/done.txt

#!/bin/bash
cd CHECKOUT/build/intrinsics/code; . ENV; cd CHECKOUT; B=build/intrinsics
name=$1; shift
start=$(date +%s)
python -m alora_serve.cli.app train --recipe examples/recipes/jailbreak.toml --kind alora --seed 0 --output $B/x-$name --data examples/data/jailbreak/train.jsonl --data examples/data/jailbreak/train_context.jsonl --dtype bfloat16 --threads 1 --prefix-cache $B/prefixes/jailbreak --prefix-memory 6 "$@" >$B/x-$name.log 2>&1
echo "x-$name $(( $(date +%s) - start )) s: $(grep -a validation $B/x-$name.log | tail -1)" >>$B/done.txt

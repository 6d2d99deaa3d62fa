#!/usr/bin/env bash
# One run on several machines by torchrun. Start it on each of them with the same arguments:
#
#   NODES=2 HEAD=node1:29500 configs/launch/torchrun.sh --config my.yaml
#
# and, to go on where the run stopped, on each of them:
#
#   NODES=2 HEAD=node1:29500 configs/launch/torchrun.sh --config my.yaml --ckpt_path last
#
# All machines need the same trainer.default_root_dir, on a file system that they share: the first
# process writes the checkpoints, all of them read.
set -euo pipefail

nodes=${NODES:?how many machines}
head=${HEAD:?host:port of one of the machines, which the others can reach}
processes=${PROCESSES:-gpu}  # per machine; "gpu": one for each GPU
strategy=${STRATEGY:-ddp}

# ADDRESS: the name under which the others reach this machine, where its host name is not one.
exec torchrun \
  --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "${RUN_ID:-lora}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} \
  --no-python lora-lightning fit \
  --trainer.num_nodes "$nodes" --trainer.devices "${processes/gpu/auto}" \
  --trainer.strategy "$strategy" "$@"

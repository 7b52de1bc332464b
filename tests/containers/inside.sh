#!/usr/bin/env bash
# Runs a command beside a podman service, inside namespaces that run_stage.py has made and that take everything away with
# them: mounts, processes, network, cgroups.
#
#   inside.sh FOLDER COMMAND...      FOLDER/storage holds the images
set -euo pipefail
folder=$1
shift

mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
for controller in cpu cpuacct cpuset memory devices freezer blkio pids; do
  mkdir "/sys/fs/cgroup/$controller"
  mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller"
done
ip link set lo up

mkdir /run/containers
cat >/run/containers/storage.conf <<END
[storage]
driver = "overlay"
graphroot = "/run/containers/storage"
runroot = "/run/containers/run"
[storage.options]
additionalimagestores = ["$folder/storage"]
END
cat >/run/containers/containers.conf <<END
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
static_dir = "/run/containers/static"
tmp_dir = "/run/containers/tmp"
volume_path = "/run/containers/volumes"
[network]
network_backend = "netavark"
network_config_dir = "/run/containers/networks"
END
export CONTAINERS_STORAGE_CONF=/run/containers/storage.conf CONTAINERS_CONF=/run/containers/containers.conf
export DOCKER_HOST=unix:///run/podman.sock

podman system service --time 0 "$DOCKER_HOST" &
# Health checks are timers of systemd, which is not here.
while sleep 1; do
  for container in $(podman ps --quiet --filter health=starting --filter health=healthy --filter health=unhealthy); do
    podman healthcheck run "$container" || true
  done
done >/dev/null 2>&1 &

status=0
"$@" || status=$?
podman rm --all --force --time 0 >/dev/null # the cgroups too, which would outlive the namespaces
exit "$status"

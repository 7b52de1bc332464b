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

# In the place where every podman looks, that which conmon starts when a container ends too: variables do not reach it.
cp -r /etc/containers /run/configuration
mount --bind /run/configuration /etc/containers
cat >/etc/containers/storage.conf <<END
[storage]
driver = "overlay"
graphroot = "/run/containers/storage"
runroot = "/run/containers/run"
[storage.options]
additionalimagestores = ["$folder/storage"]
END
cat >/etc/containers/containers.conf <<END
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
static_dir = "/run/containers/storage/libpod" # as it is after --root, which conmon calls podman with
tmp_dir = "/run/containers/tmp"
volume_path = "/run/containers/volumes"
[network]
network_backend = "netavark"
network_config_dir = "/run/containers/networks"
END
unset CONTAINERS_STORAGE_CONF CONTAINERS_CONF
export DOCKER_HOST=unix:///run/podman.sock

# Every start of a container with a health check logs that there is no systemd.
podman system service --time 0 "$DOCKER_HOST" 2>"$folder/podman.log" &
# It would make timers of them.
while sleep 3; do
  for container in $(podman ps --quiet --filter health=starting --filter health=healthy --filter health=unhealthy); do
    podman healthcheck run "$container" || true
  done
done >/dev/null 2>&1 &

status=0
"$@" || status=$?
podman rm --all --force --time 0 >/dev/null 2>>"$folder/podman.log" # the cgroups too, which would outlive the namespaces
exit "$status"

#!/bin/bash
# Waits for the settings that the controller writes, runs mosquitto on them, and has it read them again when they change:
# a revocation list counts only after SIGHUP.
set -euo pipefail
settings=/var/lib/edgefleet-controller/broker
until [ -s "$settings/mosquitto.conf" ]; do
  echo "waiting for $settings/mosquitto.conf from the controller"
  sleep 2
done
# Not the whole folder: mosquitto keeps its own store there.
state() { find "$settings" -type f \( -name '*.pem' -o -name '*.crl' -o -name acl -o -name mosquitto.conf \) -print0 | sort -z | xargs -0r sha256sum; }
seen=$(state)
mosquitto -c "$settings/mosquitto.conf" &
broker=$!
trap 'kill -TERM $broker' TERM INT
while kill -0 $broker 2>/dev/null; do
  sleep 2 &
  wait $! || true
  now=$(state)
  if [ "$now" != "$seen" ]; then
    seen=$now
    kill -HUP $broker
  fi
done
wait $broker

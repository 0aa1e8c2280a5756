#!/bin/sh
# Enrols the board once, with its one-time token, then becomes its agent.
set -eu
state=/var/lib/edgefleet
if [ ! -e "$state/agent.json" ]; then
  if [ ! -s "$EDGEFLEET_TOKEN_FILE" ]; then
    echo "no token in $EDGEFLEET_TOKEN_FILE: see docker/README.md" >&2
    exit 1
  fi
  fleet-agent enroll --url "$EDGEFLEET_URL" --token-file "$EDGEFLEET_TOKEN_FILE" --state "$state"
fi
exec fleet-agent run --state "$state"

#!/bin/sh
# Gives PostgreSQL's password to libpq, sets the controller up once, then becomes it.
set -eu
if [ -n "${EDGEFLEET_DATABASE_PASSWORD_FILE:-}" ]; then
  PGPASSWORD=$(cat "$EDGEFLEET_DATABASE_PASSWORD_FILE")
  export PGPASSWORD
fi
if [ ! -e "$EDGEFLEET_HOME/.initialised" ]; then
  fleet init
  touch "$EDGEFLEET_HOME/.initialised"
fi
exec fleet serve

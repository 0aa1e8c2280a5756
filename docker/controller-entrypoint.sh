#!/bin/sh
# Makes the fleet once, writes the broker's settings, then becomes the controller.
set -eu
if [ ! -e "$EDGEFLEET_HOME/controller.yaml" ]; then
  # These names stand in the certificate that API and broker show.
  fleet init --listen "$EDGEFLEET_LISTEN" --public-url "$EDGEFLEET_PUBLIC_URL" --broker-host "${EDGEFLEET_BROKER%:*}"
fi
python /opt/broker_settings.py
exec fleet serve

# The broker: Debian's mosquitto with the settings that the controller writes.
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends mosquitto && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --user-group edgefleet \
 && install -d -o edgefleet -g edgefleet -m 0700 /var/lib/edgefleet-controller /var/lib/edgefleet-controller/broker
COPY docker/broker-entrypoint.sh /opt/
USER edgefleet
CMD ["/opt/broker-entrypoint.sh"]

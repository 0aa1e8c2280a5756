# The controller. Everything at its locked hash; the distributions are built from the tree.
FROM python:3.11-slim AS build
WORKDIR /build
COPY requirements/build.txt requirements/controller.txt requirements/
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt \
 && python -m venv /opt/edgefleet \
 && /opt/edgefleet/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements/controller.txt
COPY shared shared
COPY controller controller
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./shared ./controller \
 && /opt/edgefleet/bin/pip install --no-cache-dir --no-deps --no-index wheels/*.whl

FROM python:3.11-slim
COPY --from=build /opt/edgefleet /opt/edgefleet
COPY docker/healthcheck.py docker/broker_settings.py docker/controller-entrypoint.sh /opt/
# The broker has the same number, so that it can read the key that the controller writes for it.
RUN useradd --system --uid 10001 --user-group edgefleet \
 && install -d -o edgefleet -g edgefleet -m 0700 /var/lib/edgefleet-controller /var/lib/edgefleet-controller/broker
ENV PATH=/opt/edgefleet/bin:$PATH PYTHONUNBUFFERED=1
USER edgefleet
CMD ["/opt/controller-entrypoint.sh"]

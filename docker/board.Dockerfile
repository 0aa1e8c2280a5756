# A board: agent and runtime, with one inference engine (onnxruntime, litert, openvino or iree).
FROM python:3.11-slim AS build
ARG ENGINE=onnxruntime
WORKDIR /build
COPY requirements/build.txt requirements/agent-${ENGINE}.txt requirements/
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt \
 && python -m venv /opt/edgefleet \
 && /opt/edgefleet/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements/agent-${ENGINE}.txt
COPY shared shared
COPY agent agent
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./shared ./agent \
 && /opt/edgefleet/bin/pip install --no-cache-dir --no-deps --no-index wheels/*.whl

FROM python:3.11-slim
COPY --from=build /opt/edgefleet /opt/edgefleet
COPY docker/healthcheck.py docker/agent-entrypoint.sh /opt/
RUN useradd --system --uid 10001 --user-group edgefleet \
 && install -d -o edgefleet -g edgefleet -m 0750 /var/lib/edgefleet /run/edgefleet
ENV PATH=/opt/edgefleet/bin:$PATH PYTHONUNBUFFERED=1
USER edgefleet
CMD ["fleet-agent", "run", "--state", "/var/lib/edgefleet"]
